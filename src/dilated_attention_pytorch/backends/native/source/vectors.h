/* Vectors of floats by one width macro: 16 lanes (AVX-512), 8 (AVX2 with FMA), 4 (anything else).
 * Intrinsics stand only where vector extensions have no word for it; each has a portable form beside it. */
#ifndef DA_VECTORS_H
#define DA_VECTORS_H

#include <stdint.h>
#include <string.h>

#if defined(DA_PORTABLE)
#define W 4
#elif defined(__AVX512F__)
#define W 16
#elif defined(__AVX2__) && defined(__FMA__)
#define W 8
#else
#define W 4
#endif

#if !defined(DA_PORTABLE) && (W >= 8 || defined(__SSE2__))
#define DA_X86 1
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));
typedef uint8_t vb __attribute__((vector_size(W)));

/* Registers: with 32 of them a tile of 4 vectors by 6 numbers fits, with 16 one of 2 by 6. */
#if W == 16 || defined(__aarch64__)
#define U 4
#else
#define U 2
#endif
#define QB 64             /* queries of a tile: lanes, in GROUPS groups of U vectors */
#define GROUPS (QB / (U * W))

INLINE vf load(const float *p) { return *(const vf *)p; } /* aligned */
INLINE void store(float *p, vf x) { *(vf *)p = x; }
INLINE vf loadu(const float *p) { vf x; memcpy(&x, p, sizeof x); return x; }
INLINE void storeu(float *p, vf x) { memcpy(p, &x, sizeof x); }
INLINE vf all(float x) { return x - (vf){0}; }
INLINE vi alli(int32_t x) { return x - (vi){0}; }
INLINE vf choose(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }

/* The larger; b where either is NaN, so that a NaN logit passes through when it is b. */
INLINE vf maximum(vf a, vf b) {
#if defined(DA_X86) && W == 16
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(DA_X86) && W == 8
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(DA_X86)
  return (vf)_mm_max_ps((__m128)a, (__m128)b);
#else
  return choose((vi)(a > b), a, b);
#endif
}

/* 2^x for x <= 1 or so, relative error 1e-7, exactly 0 from -127 down (-150 with AVX-512), NaN for NaN. */
INLINE vf exp2v(vf x) {
#if defined(DA_X86) && W == 16
  vf n = (vf)_mm512_roundscale_ps((__m512)x, 8), f = x - n;
#else
  vf y = maximum(all(-126.0f), x), t = y + 12582912.0f; /* 1.5 * 2^23: the integer lands in the low bits */
  vf f = y - (t - 12582912.0f);
#endif
  vf p = all(1.5469e-4f); /* minimax on [-1/2, 1/2], error 2.5e-9 */
  p = p * f + 1.3388799e-3f;
  p = p * f + 9.6179717e-3f;
  p = p * f + 5.5503324e-2f;
  p = p * f + 2.4022650e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
#if defined(DA_X86) && W == 16
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  vi scaled = (vi)p + (vi)((vu)(vi)t << 23);
  return (vf)(scaled & ~(vi)(x <= -126.0f));
#endif
}

/* log2 x for x > 0 and normal, absolute error below 1e-7 beside the rounding of the result. */
INLINE vf log2v(vf x) {
  vi bits = (vi)x, e = (bits - 0x3f3504f3) >> 23; /* mantissa in [sqrt(1/2), sqrt(2)) */
  vf m = (vf)(bits - (e << 23)), t = (m - 1.0f) / (m + 1.0f), s = t * t;
  vf p = s * 0.3205989f + 0.4121986f; /* 2 / (9 ln 2), 2 / (7 ln 2), ... */
  p = p * s + 0.5770780f;
  p = p * s + 0.9617967f;
  p = p * s + 2.8853901f;
  return __builtin_convertvector(e, vf) + p * t;
}

enum { F32 = 0, BF16 = 1, F16 = 2 };

INLINE vu widen(vh x) { return __builtin_convertvector(x, vu); }

/* float16 bits to float32: the exponent is rebiased by a product, which is exact for subnormal numbers too. */
INLINE vf from_half(vh x) {
  vu u = widen(x), magnitude = (u & 0x7fffu) << 13, special = (vu)((vi)(magnitude >= 0x0f800000u));
  vf y = (vf)magnitude * 0x1p112f;
  return (vf)((vu)y | (special & 0x7f800000u) | ((u & 0x8000u) << 16));
}

INLINE vf from_bfloat(vh x) { return (vf)(widen(x) << 16); }

/* Round to nearest, ties to even, as PyTorch does; NaN stays NaN. */
INLINE vh to_bfloat(vf x) {
  vu u = (vu)x, nan = (vu)(vi)(x != x);
  vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0u), vh);
}

INLINE vh to_half(vf x) {
  vu u = (vu)x, sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  vu normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  vu small = (vu)((vf)magnitude + 0.5f) - 0x3f000000u; /* below 2^-14: the sum rounds to steps of 2^-24 */
  vu is_small = (vu)(vi)(magnitude < 0x38800000u), over = (vu)(vi)(magnitude >= 0x477ff000u);
  vu nan = (vu)(vi)(magnitude > 0x7f800000u);
  vu y = (small & is_small) | (normal & ~is_small);
  y = (y & ~over) | (over & 0x7c00u) | (nan & 0x0200u);
  return __builtin_convertvector(y | sign, vh);
}

/* Elements at, ..., at + count of an array of this dtype; lanes past count are 0. */
INLINE vf load_row(const void *data, int64_t at, int64_t count, int dtype) {
  if (dtype == F32) {
    const float *p = (const float *)data + at;
    if (count >= W) return loadu(p);
    vf x = {0};
    memcpy(&x, p, (size_t)count * 4);
    return x;
  }
  const uint16_t *p = (const uint16_t *)data + at;
  vh x = {0};
  memcpy(&x, p, (size_t)(count < W ? count : W) * 2);
  return dtype == BF16 ? from_bfloat(x) : from_half(x);
}

INLINE void store_row(void *data, int64_t at, int64_t count, int dtype, vf x) {
  size_t n = (size_t)(count < W ? count : W);
  if (dtype == F32) {
    if (count >= W) storeu((float *)data + at, x);
    else memcpy((float *)data + at, &x, n * 4);
    return;
  }
  vh y = dtype == BF16 ? to_bfloat(x) : to_half(x);
  memcpy((uint16_t *)data + at, &y, n * 2);
}

/* W rows of W numbers turned into W columns, by exchanging blocks of 1, 2, 4, ... */
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define DA_SHUFFLE 1
#endif
#endif

#if defined(DA_SHUFFLE)
#define EXCHANGE(r, h, first, second)                                                     \
  for (int i = 0; i < W; i++)                                                             \
    if (!(i & (h))) {                                                                     \
      vf a = r[i], b = r[i + (h)];                                                        \
      r[i] = __builtin_shufflevector(a, b, first);                                        \
      r[i + (h)] = __builtin_shufflevector(a, b, second);                                 \
    }
#define LIST(...) __VA_ARGS__
#define EXCHANGE_LISTS(r, h, first, second) EXCHANGE(r, h, LIST first, LIST second)
#endif

INLINE void transpose(vf r[W]) {
#if !defined(DA_SHUFFLE)
  float x[W][W];
  for (int i = 0; i < W; i++) memcpy(x[i], &r[i], sizeof r[i]);
  for (int i = 0; i < W; i++)
    for (int j = 0; j < W; j++) r[i][j] = x[j][i];
#elif W == 16
  EXCHANGE_LISTS(r, 1, (0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
                 (1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))
  EXCHANGE_LISTS(r, 2, (0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
                 (2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
  EXCHANGE_LISTS(r, 4, (0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
                 (4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))
  EXCHANGE_LISTS(r, 8, (0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
                 (8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
#elif W == 8
  EXCHANGE_LISTS(r, 1, (0, 8, 2, 10, 4, 12, 6, 14), (1, 9, 3, 11, 5, 13, 7, 15))
  EXCHANGE_LISTS(r, 2, (0, 1, 8, 9, 4, 5, 12, 13), (2, 3, 10, 11, 6, 7, 14, 15))
  EXCHANGE_LISTS(r, 4, (0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15))
#else
  EXCHANGE_LISTS(r, 1, (0, 4, 2, 6), (1, 5, 3, 7))
  EXCHANGE_LISTS(r, 2, (0, 1, 4, 5), (2, 3, 6, 7))
#endif
}

#endif
