/* Weights as they are stored, as floats or in 16 bits, and what is read of them. Part of packing.c. */

#ifndef READING_H
#define READING_H

#include <stdint.h>
#include <string.h>

#define PART 2048
#define MAGNITUDE 0x7fffffffu
#define EXPONENT 0x7f800000u

static inline uint32_t bits_of(float x) { uint32_t t; memcpy(&t, &x, 4); return t; }
static inline float float_of(uint32_t t) { float x; memcpy(&x, &t, 4); return x; }
static inline uint32_t most(uint32_t a, uint32_t b) { return a > b ? a : b; }

/* What weights are stored as, and below what scales are. */

enum { F32, BF16, F16, E8M0, E4M3 };

static inline const void *behind(const void *w, int kind, int64_t count) {
    return (const char *)w + count * (kind == F32 ? 4 : 2);
}

static inline float f16_read(uint16_t stored) {
    uint32_t a = (uint32_t)(stored & 0x7fff) << 13; /* the exponent counts from 2^-15; 0 is 2^-14, and no leading one */
    uint32_t normal = a + ((a < 0x0f800000u ? 112u : 224u) << 23);
    uint32_t small = bits_of(float_of(a + (113u << 23)) - 0x1p-14f);
    return float_of((a < (1u << 23) ? small : normal) | (uint32_t)(stored & 0x8000) << 16);
}

static inline float read_16(uint16_t stored, int kind) {
    return kind == BF16 ? float_of((uint32_t)stored << 16) : f16_read(stored);
}

/* Weights as floats, in `room` if they are not yet; no more than PART. */
static inline const float *floats(const void *w, int kind, int64_t count, float *room) {
    const uint16_t *stored = w;
    if (kind == F32) return w;
    if (kind == BF16) for (int64_t j = 0; j < count; j++) room[j] = read_16(stored[j], BF16);
    else for (int64_t j = 0; j < count; j++) room[j] = read_16(stored[j], F16);
    return room;
}

/* The largest magnitude of every group; of magnitudes, bits are in order. */

static inline uint32_t largest_32(const float *w, int64_t count) {
    uint32_t found = 0;
    for (int64_t j = 0; j < count; j++) found = most(found, bits_of(w[j]) & MAGNITUDE);
    return found;
}

static inline uint16_t largest_16(const uint16_t *w, int64_t count) {
    uint16_t found = 0;
    for (int64_t j = 0; j < count; j++) {
        uint16_t a = w[j] & 0x7fff;
        found = a > found ? a : found;
    }
    return found;
}

static inline float largest(const void *w, int kind, int64_t count) {
    return kind == F32 ? float_of(largest_32(w, count)) : read_16(largest_16(w, count), kind);
}

static inline float group_largest(const void *w, int kind, int64_t columns) {
    return columns == 16 ? largest(w, kind, 16) : columns == 32 ? largest(w, kind, 32) : largest(w, kind, columns);
}

#endif
