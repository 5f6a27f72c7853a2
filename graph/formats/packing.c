/* Weights into codes, and into what their codes stand for, in one pass over memory.

   What native.py builds where there is a C compiler. The bytes and the numbers are those of the torch ops in
   elements.py, scales_of.py and of bitsandbytes, which stay the definition and run everywhere else.

   Weights come in groups of `columns`, each with one scale; `groups` of them lie behind one another, as floats or in
   16 bits. A part of them is divided by their scales into a buffer that stays in the first cache, and loops without
   branches over that buffer are what compilers turn into vector instructions. */

#include "reading.h"

static inline uint32_t least(uint32_t a, uint32_t b) { return a < b ? a : b; }
static inline float within(float x, float low, float high) { x = x > low ? x : low; return x < high ? x : high; }

/* Weights a scale at a time. Loops of a length that is known are unrolled, so the usual lengths are told apart. */

typedef struct { const void *w; int kind; const float *scale; int64_t left, columns, in_group; } Reader;

static inline void divide(const float *restrict w, float scale, int64_t count, float *restrict x) {
    for (int64_t j = 0; j < count; j++) x[j] = w[j] / scale;
}

static inline void multiply(float *x, float scale, int64_t count) {
    for (int64_t j = 0; j < count; j++) x[j] *= scale;
}

/* The next part of the weights, divided; how many there are, 0 at the end. */
static int64_t next(Reader *r, float *x) {
    float room[PART];
    int64_t count = r->left < PART ? r->left : PART, done = 0;
    const float *w = floats(r->w, r->kind, count, room);
    while (done < count) {
        int64_t run = r->columns - r->in_group;
        if (run > count - done) run = count - done;
        if (run == 16) divide(w + done, *r->scale, 16, x + done);
        else if (run == 32) divide(w + done, *r->scale, 32, x + done);
        else divide(w + done, *r->scale, run, x + done);
        done += run, r->in_group += run;
        if (r->in_group == r->columns) r->in_group = 0, r->scale++;
    }
    r->w = behind(r->w, r->kind, count), r->left -= count;
    return count;
}

/* The same walk once more over what was divided: times its scale. */
static void scaled_back(Reader *r, int64_t count, float *x) {
    for (int64_t done = 0; done < count;) {
        int64_t run = r->columns - r->in_group;
        if (run > count - done) run = count - done;
        if (run == 16) multiply(x + done, *r->scale, 16);
        else if (run == 32) multiply(x + done, *r->scale, 32);
        else multiply(x + done, *r->scale, run);
        done += run, r->in_group += run;
        if (r->in_group == r->columns) r->in_group = 0, r->scale++;
    }
}

void magnitudes(const void *w, int kind, int64_t groups, int64_t columns, float *out) {
    for (int64_t g = 0; g < groups; g++, w = behind(w, kind, columns)) out[g] = group_largest(w, kind, columns);
}

/* e4m3: to the nearest, ties to even, saturating; below 2^-6 numbers are 2^-9 apart.

   Adding 2^(e + 20) rounds a number of exponent e to four digits, and leaves them in the low bits. With eight more for
   every power of two these are the codes; what they are too large by is in the power's own low bits. */

static inline uint32_t e4m3_code(float x) {
    uint32_t t = bits_of(x), a = t & MAGNITUDE, kept = least(a, 0x43e00000u); /* 448 */
    uint32_t power = (most(kept, 121u << 23) & EXPONENT) + ((20u << 23) + 152);
    uint32_t code = bits_of(float_of(kept) + float_of(power)) + (power >> 20);
    return (a > EXPONENT ? 0x7f : code & 0x7f) | (t >> 24 & 0x80);
}

static inline float e4m3_nearest(float x) {
    uint32_t t = bits_of(x), a = t & MAGNITUDE;
    uint32_t kept = a > EXPONENT ? a : least(a, 0x43e00000u);
    uint32_t normal = (kept + 0x7ffffu + (kept >> 20 & 1)) & 0xfff00000u;
    uint32_t small = bits_of((float_of(kept) + 16384.0f) - 16384.0f);
    return float_of((t ^ a) | (a > EXPONENT ? a : kept < (121u << 23) ? small : normal));
}

/* e2m1: the same with 2^(e + 22) and one digit less; below 1 numbers are a half apart. */

static inline uint32_t e2m1_power(uint32_t a) {
    return (least(most(a, 0x3f800000u), 0x40800000u) & EXPONENT) + (22u << 23); /* of 1, 2 or 4 */
}

static inline uint32_t e2m1_code(float x) {
    uint32_t t = bits_of(x + 0.0f), a = least(t & MAGNITUDE, 0x40c00000u);    /* -0 becomes 0; 6 */
    uint32_t power = e2m1_power(a) + 214;
    return ((bits_of(float_of(a) + float_of(power)) + (power >> 22)) & 7) | (t >> 28 & 8);
}

static inline float e2m1_nearest(float x) {
    uint32_t t = bits_of(x), sign = t & ~MAGNITUDE, a = least(t & MAGNITUDE, 0x40c00000u);
    float power = float_of(e2m1_power(a));
    return float_of(bits_of((float_of(a) + power) - power) | sign);
}

/* Integers: adding 1.5 * 2^23 rounds to one, and leaves it in the low bits. */

static inline uint32_t integer_code(float x, int half) {
    return bits_of(within(x, -half, half - 1) + (12582912.0f + half)) & (2 * half - 1);
}

static inline float integer_nearest(float x, int half) {
    return (within(x, -half, half - 1) + 12582912.0f) - 12582912.0f;
}

/* Codes into bytes, the first of a byte in its low bits. Words are little-endian wherever torch runs. */

static inline void joined_8(const uint32_t *codes, int64_t count, uint8_t *out) {
    for (int64_t j = 0; j < count; j++) out[j] = (uint8_t)codes[j];
}

static inline void joined_4(const uint32_t *codes, int64_t count, uint8_t *out) {
    for (int64_t j = 0; j < count / 2; j++) {
        uint64_t two;
        memcpy(&two, codes + 2 * j, 8);
        out[j] = (uint8_t)(two | two >> 28);
    }
}

static inline void joined_2(const uint32_t *codes, int64_t count, uint8_t *out) {
    uint8_t pairs[PART / 2];
    for (int64_t j = 0; j < count / 2; j++) {
        uint64_t two;
        memcpy(&two, codes + 2 * j, 8);
        pairs[j] = (uint8_t)(two | two >> 30);
    }
    for (int64_t j = 0; j < count / 4; j++) {
        uint16_t two;
        memcpy(&two, pairs + 2 * j, 2);
        out[j] = (uint8_t)(two | two >> 4);
    }
}

/* The scales that weights find for themselves, as they are stored: see scales_of.py. */

typedef struct { int rule; float largest, divisor; } Scales;

static inline float bf16_nearest(float x) {
    uint32_t t = bits_of(x);
    return float_of((t + 0x7fffu + (t >> 16 & 1)) & 0xffff0000u);
}

static inline float f16_nearest(float x) {
    float power = float_of((most(bits_of(x), 113u << 23) & EXPONENT) + (13u << 23)); /* from 2^-14 down 2^-24 apart */
    return x < 65520.0f ? (x + power) - power : float_of(EXPONENT);
}

static inline float or_else(float x, float otherwise) { return x == 0.0f ? otherwise : x; }

static inline float e8m0_scale(float size, int top) {
    int32_t exponent = (int32_t)((bits_of(size) + (1u << 21)) >> 23) - top;
    return float_of(exponent > 0 ? (uint32_t)(exponent < 254 ? exponent : 254) << 23 : 1u << 22);
}

#define EACH(value) for (int64_t i = 0; i < count; i++) x[i] = value; break

/* Of largest magnitudes, in place. */
static void stored_scales(Scales how, int64_t count, float *x) {
    switch (how.rule) {
    case F32: EACH(or_else(x[i] / how.largest, 0x1p-23f));
    case BF16: EACH(or_else(bf16_nearest(x[i] / how.largest), 0x1p-7f));
    case F16: EACH(or_else(f16_nearest(x[i] / how.largest), 0x1p-10f));
    case E4M3: EACH(or_else(e4m3_nearest(how.divisor * (x[i] / how.largest)), 0.125f));
    case E8M0: EACH(e8m0_scale(x[i], how.largest == 448.0f ? 8 : 2));
    }
}

typedef struct { Scales how; const void *w; int kind; int64_t left, columns; float *stored, *read; } Finder;

/* Find the scales of all groups that begin within so many weights; returns how many weights have one. */
static int64_t find(Finder *f, int64_t weights, int64_t known) {
    int64_t count = (weights - known + f->columns - 1) / f->columns;
    if (weights <= known || !f->left) return known;
    if (count > f->left) count = f->left;
    magnitudes(f->w, f->kind, count, f->columns, f->stored);
    f->w = behind(f->w, f->kind, count * f->columns);
    stored_scales(f->how, count, f->stored);
    for (int64_t g = 0; g < count; g++) f->read[g] = f->stored[g] / f->how.divisor;
    f->left -= count, f->stored += count, f->read += count;
    return known + count * f->columns;
}

/* With `how`, scales are found, and written as they are stored and as they are read; without, they are given. */

#define OVER_PARTS(prepare, work)                                                                                     \
    Reader r = {w, kind, scale, groups * columns, columns, 0};                                                        \
    Finder f = {how ? *how : (Scales){0}, w, kind, groups, columns, stored, scale};                                   \
    int64_t known = 0, seen = 0;                                                                                      \
    for (int64_t count;; seen += count) {                                                                             \
        if (how) known = find(&f, seen + PART, known);                                                                \
        prepare;                                                                                                      \
        if (!count) return;                                                                                           \
        work;                                                                                                         \
    }

#define ENCODE(name, bits, code)                                                                                      \
    static inline void encode_with_##name(const Scales *how, const void *w, int kind, float *stored, float *scale,    \
                                          int64_t groups, int64_t columns, uint8_t *out) {                            \
        float x[PART];                                                                                                \
        uint32_t codes[PART];                                                                                         \
        OVER_PARTS(count = next(&r, x), {                                                                             \
            for (int64_t j = 0; j < count; j++) codes[j] = code;                                                      \
            joined_##bits(codes, count, out);                                                                         \
            out += count * bits / 8;                                                                                  \
        })                                                                                                            \
    }                                                                                                                 \
    void encode_##name(const void *w, int kind, float *scale, int64_t groups, int64_t columns, uint8_t *out) {        \
        encode_with_##name(0, w, kind, 0, scale, groups, columns, out);                                               \
    }                                                                                                                 \
    void pack_##name(const void *w, int kind, int64_t groups, int64_t columns, int rule, float largest,               \
                     float divisor, float *stored, float *scale, uint8_t *out) {                                      \
        Scales how = {rule, largest, divisor};                                                                        \
        encode_with_##name(&how, w, kind, stored, scale, groups, columns, out);                                       \
    }

ENCODE(e4m3, 8, e4m3_code(x[j]))
ENCODE(e2m1, 4, e2m1_code(x[j]))
ENCODE(int8, 8, integer_code(x[j], 128))
ENCODE(int4, 4, integer_code(x[j], 8))
ENCODE(int2, 2, integer_code(x[j], 2))

#define NEAREST(name, value)                                                                                          \
    static inline void nearest_with_##name(const Scales *how, const void *w, int kind, float *stored, float *scale,   \
                                           int64_t groups, int64_t columns, float *out) {                             \
        Reader back;                                                                                                  \
        OVER_PARTS((back = r, count = next(&r, out)), {                                                               \
            for (int64_t j = 0; j < count; j++) out[j] = value;                                                       \
            scaled_back(&back, count, out);                                                                           \
            out += count;                                                                                             \
        })                                                                                                            \
    }                                                                                                                 \
    void nearest_##name(const void *w, int kind, float *scale, int64_t groups, int64_t columns, float *out) {         \
        nearest_with_##name(0, w, kind, 0, scale, groups, columns, out);                                              \
    }                                                                                                                 \
    void round_##name(const void *w, int kind, int64_t groups, int64_t columns, int rule, float largest,              \
                      float divisor, float *stored, float *scale, float *out) {                                       \
        Scales how = {rule, largest, divisor};                                                                        \
        nearest_with_##name(&how, w, kind, stored, scale, groups, columns, out);                                      \
    }

NEAREST(e4m3, e4m3_nearest(out[j]))
NEAREST(e2m1, e2m1_nearest(out[j]))
NEAREST(int8, integer_nearest(out[j], 128))
NEAREST(int6, integer_nearest(out[j], 32))
NEAREST(int4, integer_nearest(out[j], 8))
NEAREST(int3, integer_nearest(out[j], 4))
NEAREST(int2, integer_nearest(out[j], 2))

/* Which of 16 ascending levels is nearest, by the 15 bounds between them; the earlier index in the high half. */

void encode_levels(const void *w, int kind, const float *bounds, int64_t blocks, int64_t columns, float *absmax,
                   uint8_t *out) {
    float x[PART], room[PART];
    uint32_t codes[PART];
    for (int64_t b = 0; b < blocks; b++) {
        float size = absmax[b] = group_largest(w, kind, columns);
        float factor = 1.0f / (size < 1e-38f ? 1e-38f : size);
        for (int64_t at = 0, count; at < columns; at += count, w = behind(w, kind, count)) {
            count = columns - at < PART ? columns - at : PART;
            const float *read = floats(w, kind, count, room);
            for (int64_t j = 0; j < count; j++) x[j] = read[j] * factor;
            for (int64_t j = 0; j < count; j++) {
                uint32_t code = 0;
                for (int k = 0; k < 15; k++) code += !(x[j] <= bounds[k]);
                codes[j] = code;
            }
            for (int64_t j = 0; j < count / 2; j++) {
                uint64_t two;
                memcpy(&two, codes + 2 * j, 8);
                *out++ = (uint8_t)(two << 4 | two >> 32);
            }
        }
    }
}
