/* Picking the levels of lookup tables and what the fit of their scales needs: see fit.py, whose torch ops define the
   numbers.

   Built together with packing.c. A row is looked at in parts that stay in the first cache. An error is a sum of
   doubles, in eight lanes that are added up in the end. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 8
#define AT_ONCE 32
#define PART 512
#define WIDEST 16
#define SMALLEST_SCALE 1e-12f

static void normed(const float *restrict w, const float *restrict s, int64_t count, float *restrict x) {
    for (int64_t j = 0; j < count; j++) {
        float scale = fabsf(s[j]) < SMALLEST_SCALE ? copysignf(SMALLEST_SCALE, s[j]) : s[j];
        x[j] = w[j] / scale;
    }
}

typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));

/* How many thresholds are below each value. Four vectors at a time, so that their counts stay in registers. */
static void counted(const float *restrict x, const float *thresholds, int64_t n, uint8_t *restrict at) {
    Floats values[4];
    Ints counts[4] = {{0}};
    memcpy(values, x, sizeof values);
    for (int64_t k = 0; k + 1 < n; k++) {
        Floats threshold = thresholds[k] - (Floats){0};
        for (int v = 0; v < 4; v++) counts[v] -= values[v] > threshold;
    }
    for (int j = 0; j < AT_ONCE; j++) at[j] = (uint8_t)((const int32_t *)counts)[j];
}

/* The number of the nearest level of every value, and that level. */
static void picked(const float *restrict x, int64_t count, const float *restrict levels, const float *thresholds, int64_t n,
                   float *restrict q, uint8_t *restrict at) {
    int64_t whole = count - count % AT_ONCE;
    for (int64_t j = 0; j < whole; j += AT_ONCE) counted(x + j, thresholds, n, at + j);
    for (int64_t j = whole; j < count; j++) {
        at[j] = 0;
        for (int64_t k = 0; k + 1 < n; k++) at[j] += x[j] > thresholds[k];
    }
    for (int64_t j = 0; j < count; j++) q[j] = levels[at[j]];
}

static void squared(const float *restrict w, const float *restrict s, const float *restrict q,
                    const float *restrict moments, int64_t count, double *lanes) {
    float errors[PART];
    for (int64_t j = 0; j < count; j++) {
        float left = w[j] - q[j] * s[j];
        errors[j] = left * left;
    }
    if (moments)
        for (int64_t j = 0; j < count; j++) errors[j] *= moments[j];
    int64_t j = 0;
    for (; j + LANES <= count; j += LANES)
        for (int k = 0; k < LANES; k++) lanes[k] += errors[j + k];
    for (; j < count; j++) lanes[0] += errors[j];
}

/* The numbers of the nearest levels under scales `s`; the squared error that is left, weighted by column. */
double lut_assign(const float *w, const float *s, int64_t rows, int64_t columns, const float *levels,
                  const float *thresholds, int64_t n, const float *moments, uint8_t *indices) {
    float x[PART], q[PART];
    double lanes[LANES] = {0}, sum = 0;
    for (int64_t row = 0; row < rows; row++, w += columns, s += columns, indices += columns)
        for (int64_t at = 0; at < columns; at += PART) {
            int64_t here = columns - at < PART ? columns - at : PART;
            normed(w + at, s + at, here, x);
            picked(x, here, levels, thresholds, n, q, indices + at);
            squared(w + at, s + at, q, moments ? moments + at : 0, here, lanes);
        }
    for (int k = 0; k < LANES; k++) sum += lanes[k];
    return sum;
}

/* The numbers of the nearest levels, and those levels; scales may be none. */
void lut_nearest(const float *w, const float *s, int64_t rows, int64_t columns, const float *levels,
                 const float *thresholds, int64_t n, uint8_t *indices, float *out) {
    float x[PART];
    for (int64_t at = 0; at < rows * columns; at += PART) {
        int64_t here = rows * columns - at < PART ? rows * columns - at : PART;
        if (s) normed(w + at, s + at, here, x);
        picked(s ? x : w + at, here, levels, thresholds, n, out + at, indices + at);
    }
}

static void multiplied(const uint8_t *restrict indices, const float *restrict w, int64_t count,
                       const float *restrict levels, const float *restrict moments, float *restrict squares,
                       float *restrict products) {
    for (int64_t j = 0; j < count; j++) squares[j] = levels[indices[j]];
    if (moments)
        for (int64_t j = 0; j < count; j++) {
            float weighted = squares[j] * moments[j];
            products[j] = weighted * w[j];
            squares[j] *= weighted;
        }
    else
        for (int64_t j = 0; j < count; j++) {
            products[j] = squares[j] * w[j];
            squares[j] *= squares[j];
        }
}

/* m q q and m q w of some rows; of the indices and of w a row lies so many values behind the one before. */
void lut_products(const uint8_t *indices, int64_t indices_row, const float *w, int64_t w_row, int64_t rows,
                  int64_t columns, const float *levels, const float *moments, float *squares, float *products) {
    for (int64_t row = 0; row < rows; row++) {
        multiplied(indices, w, columns, levels, moments, squares, products);
        indices += indices_row, w += w_row, squares += columns, products += columns;
    }
}

/* What the levels of least squared error are quotients of: sums of m s s and of m s w, by level. */
void lut_sums(const uint8_t *indices, const float *w, const float *s, int64_t rows, int64_t columns,
              const float *moments, double *below, double *above) {
    for (int64_t row = 0; row < rows; row++, indices += columns, w += columns, s += columns)
        for (int64_t j = 0; j < columns; j++) {
            float weighted = moments ? s[j] * moments[j] : s[j];
            below[indices[j]] += (double)(weighted * s[j]);
            above[indices[j]] += (double)(weighted * w[j]);
        }
}

/* The number of the vector that is nearest in each of AT_ONCE columns, the first of several. `x` are weights times scales,
   a row for each value of a vector; `table` is -2 times the vectors, and `own` what each is off by itself. */
static void nearest_columns(const float *restrict x, int64_t width, const float *restrict table,
                            const float *restrict own, int64_t entries, uint8_t *restrict at) {
    Floats least[4], values[4];
    Ints numbers[4] = {{0}};
    for (int64_t k = 0; k < entries; k++, table += width)
        for (int i = 0; i < 4; i++) {
            memcpy(values, x + 8 * i, sizeof values[0]);
            Floats distance = values[0] * table[0];
            for (int64_t v = 1; v < width; v++) {
                memcpy(values, x + v * AT_ONCE + 8 * i, sizeof values[0]);
                distance = distance + values[0] * table[v];
            }
            distance = distance + own[k];
            Ints nearer = k ? distance < least[i] : (Ints){0} == (Ints){0};
            least[i] = (Floats)(((Ints)distance & nearer) | ((Ints)least[i] & ~nearer));
            numbers[i] = (numbers[i] & ~nearer) | ((int32_t)k & nearer);
        }
    for (int j = 0; j < AT_ONCE; j++) at[j] = (uint8_t)((const int32_t *)numbers)[j];
}

/* The numbers of the nearest vectors, `width` rows each, under scales by row, which may be none. */
void vector_nearest(const float *w, const float *s, const float *own, const float *table, int64_t groups, int64_t width,
                    int64_t columns, int64_t entries, uint8_t *indices) {
    float x[WIDEST * AT_ONCE];
    uint8_t found[AT_ONCE];
    for (int64_t group = 0; group < groups; group++, w += width * columns, own += entries, indices += columns)
        for (int64_t at = 0; at < columns; at += AT_ONCE) {
            int64_t here = columns - at < AT_ONCE ? columns - at : AT_ONCE;
            memset(x, 0, sizeof x);
            for (int64_t v = 0; v < width; v++) {
                float scale = s ? s[group * width + v] : 1.0f;
                for (int64_t j = 0; j < here; j++) x[v * AT_ONCE + j] = w[v * columns + at + j] * scale;
            }
            nearest_columns(x, width, table, own, entries, found);
            memcpy(indices + at, found, (size_t)here);
        }
}
