/* Ternary weights in one pass over memory: see ternary_rule.py, whose torch ops define the numbers.

   Built together with packing.c. Groups of `columns` weights have a threshold and a scale each; a group stays in the
   first cache while it is looked at three times. Sums are of doubles, in eight lanes that are added up in the end. */

#include <math.h>
#include <stdint.h>

#define LANES 8
#define PART 1024
#define SMALLEST 1e-8f

static inline double in_all(const double *lanes) {
    double sum = 0;
    for (int k = 0; k < LANES; k++) sum += lanes[k];
    return sum;
}

static double sum_of(const float *x, int64_t count) {
    double lanes[LANES] = {0};
    int64_t j = 0;
    for (; j + LANES <= count; j += LANES)
        for (int k = 0; k < LANES; k++) lanes[k] += x[j + k];
    for (; j < count; j++) lanes[0] += x[j];
    return in_all(lanes);
}

static double magnitudes_of(const float *w, int64_t count) {
    double lanes[LANES] = {0};
    int64_t j = 0;
    for (; j + LANES <= count; j += LANES)
        for (int k = 0; k < LANES; k++) lanes[k] += fabsf(w[j + k]);
    for (; j < count; j++) lanes[0] += fabsf(w[j]);
    return in_all(lanes);
}

static void reaching(const float *restrict w, int64_t count, float threshold, float *restrict kept,
                     float *restrict ones) {
    for (int64_t j = 0; j < count; j++) {
        float size = fabsf(w[j]);
        ones[j] = size >= threshold ? 1.0f : 0.0f;
        kept[j] = size >= threshold ? size : 0.0f;
    }
}

/* The scale of least squared error: the mean magnitude of what is not 0. */
static float least_squares(const float *w, int64_t count, float threshold, float mean) {
    float kept[PART], ones[PART];
    double above = 0, below = 0;
    for (int64_t at = 0; at < count; at += PART) {
        int64_t here = count - at < PART ? count - at : PART;
        reaching(w + at, here, threshold, kept, ones);
        above += sum_of(kept, here);
        below += sum_of(ones, here);
    }
    float scale = below > 0 ? (float)(above / below) : mean;
    return scale > SMALLEST ? scale : SMALLEST;
}

static void written(const float *restrict w, int64_t count, float threshold, float scale, float *restrict out) {
    for (int64_t j = 0; j < count; j++) out[j] = copysignf(fabsf(w[j]) >= threshold ? 1.0f : 0.0f, w[j]) * scale;
}

/* Thresholds, scales and, unless `out` is null, the weights they make. `tau` below 0 is round-clip. */
void ternary_fitted(const float *w, int64_t groups, int64_t columns, float tau, int32_t squares, float *threshold,
                    float *scale, float *out) {
    for (int64_t g = 0; g < groups; g++, w += columns) {
        float mean = (float)(magnitudes_of(w, columns) / (double)columns);
        if (!(mean > SMALLEST)) mean = SMALLEST;
        threshold[g] = tau < 0 ? nextafterf(mean / 2, INFINITY) : mean * tau;
        scale[g] = squares ? least_squares(w, columns, threshold[g], mean) : mean;
        if (out) written(w, columns, threshold[g], scale[g], out + g * columns);
    }
}

/* What weights become under thresholds and scales that are known. */
void ternary_dense(const float *w, int64_t groups, int64_t columns, const float *threshold, const float *scale,
                   float *out) {
    for (int64_t g = 0; g < groups; g++, w += columns, out += columns) written(w, columns, threshold[g], scale[g], out);
}
