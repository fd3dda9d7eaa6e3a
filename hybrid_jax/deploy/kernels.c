typedef struct {
    int32_t length; /* of the input, along this axis */
    int32_t outputs;
    int32_t window;
    int32_t stride;
    int32_t padding; /* before the input */
    int32_t dilation;
} Axis;

typedef struct {
    Axis down;
    Axis across;
    int32_t channels; /* of the input */
    int32_t features; /* of the output */
} Window;

/* Kernels are rows of [window down][window across][channels / groups], one for each feature; packed,
   two features of a group share a row, the first in the low halves of its bytes, and of an odd last
   feature two neighbours share a byte. `depthwise` says how its kernels lie. */
typedef struct {
    const int8_t *weights;
    const int32_t *bias; /* less the sum of the kernel times the zero point of the input */
    const float *multiplier;
    int32_t groups;
    int32_t packed; /* 1: two weights to a byte */
    int32_t zero;   /* of the input */
} Layer;

typedef struct {
    int32_t low; /* of what is encoded, less the zero point */
    int32_t high;
    int32_t zero;
    int32_t encoded; /* 0: a float */
} Result;

static float clamp(float x, float low, float high)
{
    return x < low ? low : x > high ? high : x;
}

/* NaN of a NaN. */
static float larger(float a, float b)
{
    return a > b || a != a ? a : b;
}

static float smaller(float a, float b)
{
    return a < b || a != a ? a : b;
}

/* The first of the largest of n scores, -1 where one is no number. */
static int32_t best(const float *scores, int32_t n)
{
    int32_t found = 0;
    for (int32_t i = 0; i < n; i++) {
        if (scores[i] != scores[i]) {
            return -1;
        }
        found = scores[i] > scores[found] ? i : found;
    }
    return found;
}

static int32_t larger_int(int32_t a, int32_t b)
{
    return a > b ? a : b;
}

static int32_t smaller_int(int32_t a, int32_t b)
{
    return a < b ? a : b;
}

/* Towards zero; zero of a NaN. */
static int64_t truncated(float x, int64_t low, int64_t high)
{
    return x != x ? 0 : x <= (float)low ? low : x >= (float)high ? high : (int64_t)x;
}

/* Ties to even: beside 1.5 * 2^23 a float has no bit left for a fraction. */
static uint8_t nearest(float x, float low, float high, int32_t zero)
{
    return (uint8_t)((int32_t)(clamp(x, low, high) + 12582912.0f - 12582912.0f) + zero);
}

/* Clamped after it is rounded, which is the same between whole limits and needs no floats. Where they
   are computed by software the product has 16 bits of fraction, and is within 2^-16 of that of
   floats: so it is rounded alike but next to a half; beyond 2^16 it is clamped. */
static uint8_t requantize(int32_t sum, float multiplier, int32_t low, int32_t high, int32_t zero)
{
#if defined(__arm__) && defined(__ARM_FP) && defined(__GNUC__)
    union {
        float value;
        int32_t bits;
    } steps = {(float)sum * multiplier};
    __asm__("vcvtr.s32.f32 %0, %0" : "+t"(steps.value)); /* ties to even; large ones saturate */
    return (uint8_t)((steps.bits < low ? low : steps.bits > high ? high : steps.bits) + zero);
#elif defined(__arm__) && !defined(__ARM_FP)
    const union {
        float value;
        uint32_t bits;
    } m = {multiplier};
    const uint32_t size = sum < 0 ? 0u - (uint32_t)sum : (uint32_t)sum;
    const int32_t shift = 134 - (int32_t)(m.bits >> 23);
    if (size < 1u << 24 && shift > 0 && shift < 32) {
        const uint64_t product = (uint64_t)size * ((m.bits & 0x7FFFFF) | 0x800000);
        const uint32_t high_word = (uint32_t)(product >> 32), beyond = high_word >> shift;
        const uint32_t fixed = (uint32_t)product >> shift | high_word << (32 - shift);
        if (beyond || (fixed & 65535) - 32767 > 1) {
            const int32_t steps = beyond ? 65536 : (int32_t)((fixed >> 16) + (fixed >> 15 & 1));
            const int32_t q = sum < 0 ? -steps : steps;
            return (uint8_t)((q < low ? low : q > high ? high : q) + zero);
        }
    }
#endif
    return nearest((float)sum * multiplier, (float)low, (float)high, zero);
}

/* A NaN becomes the zero point. */
static uint8_t quantize(float x, float multiplier, float low, float high, int32_t zero)
{
    const float steps = x * multiplier;
    return nearest(steps == steps ? steps : 0.0f, low, high, zero);
}

/* Once in the file, however often it is called. */
#ifdef __GNUC__
#define APART __attribute__((noinline))
#else
#define APART
#endif

APART static void quantize_all(const float *x, uint8_t *y, int32_t n, float multiplier,
                               const Result *to)
{
    const float low = (float)to->low, high = (float)to->high;
    const int32_t zero = to->zero;
    for (int32_t i = 0; i < n; i++) {
        y[i] = quantize(x[i], multiplier, low, high, zero);
    }
}

/* start + a * first + b * second, in steps of the multiplier. */
typedef struct {
    int32_t start;
    int32_t first;
    int32_t second;
    float multiplier;
} Terms;

APART static void add(const uint8_t *a, const uint8_t *b, uint8_t *y, int32_t n,
                      const Terms *terms, const Result *to)
{
    const int32_t start = terms->start, first = terms->first, second = terms->second;
    const int32_t low = to->low, high = to->high, zero = to->zero;
    const float multiplier = terms->multiplier;
    for (int32_t i = 0; i < n; i++) {
        y[i] = requantize(start + a[i] * first + b[i] * second, multiplier, low, high, zero);
    }
}

static uint8_t limit(int32_t q, int32_t low, int32_t high)
{
    return (uint8_t)(q < low ? low : q > high ? high : q);
}

static void put(void *y, int32_t i, int32_t sum, float multiplier, const Result *to)
{
    if (to->encoded) {
        ((uint8_t *)y)[i] = requantize(sum, multiplier, to->low, to->high, to->zero);
    } else {
        ((float *)y)[i] = (float)sum * multiplier;
    }
}

/* Taps first to end - 1 of a window lie on the input; tap k is at start + k * dilation. */
typedef struct {
    int32_t start;
    int32_t first;
    int32_t end;
} Taps;

static Taps taps(const Axis *axis, int32_t output)
{
    Taps on = {output * axis->stride - axis->padding, 0, axis->window};
    while (on.first < on.end && on.start + on.first * axis->dilation < 0) {
        on.first++;
    }
    while (on.first < on.end && on.start + (on.end - 1) * axis->dilation >= axis->length) {
        on.end--;
    }
    return on;
}

static uint8_t *filled(uint8_t *to, int32_t n, int32_t value)
{
    for (uint8_t *end = to + n; to < end; to++) {
        *to = (uint8_t)value;
    }
    return to;
}

static uint8_t *copied(uint8_t *to, const uint8_t *from, int32_t n)
{
    uint8_t *end = to + n;
#ifdef __ARM_FEATURE_UNALIGNED
    for (; end - to >= 4; to += 4, from += 4) {
        __builtin_memcpy(to, from, 4); /* one load and one store */
    }
#endif
    for (; to < end; to++, from++) {
        *to = *from;
    }
    return to;
}

APART static void copy(uint8_t *to, const uint8_t *from, int32_t n)
{
    copied(to, from, n);
}

/* The window of a pixel, tap by tap and channel by channel: where it lies in the input, or else copied
   to `to`, with the zero point where it is beside the input. */
static const uint8_t *window(const uint8_t *x, const Window *at, const Layer *layer, int32_t depth,
                             int32_t row, int32_t column, uint8_t *to)
{
    const Taps down = taps(&at->down, row), across = taps(&at->across, column);
    const int32_t inside = across.end - across.first, taps_across = at->across.window;
    /* Taps side by side are side by side in the input. */
    const int32_t run = depth == at->channels && at->across.dilation == 1 ? inside : 1;
    const int32_t left = (across.start + across.first * at->across.dilation) * at->channels;
    const int32_t line = at->across.length * at->channels;
    if (at->down.window == 1 && down.first < down.end && run == taps_across && run == inside) {
        return x + (down.start * line + left);
    }
    const uint8_t *made = to;
    for (int32_t k = 0; k < at->down.window; k++) {
        if (k < down.first || k >= down.end) {
            to = filled(to, taps_across * depth, layer->zero);
            continue;
        }
        const int32_t tap = (down.start + k * at->down.dilation) * line + left;
        to = filled(to, across.first * depth, layer->zero);
        for (int32_t l = 0; l < inside; l += run) {
            to = copied(to, x + (tap + l * at->across.dilation * at->channels), run * depth);
        }
        to = filled(to, (taps_across - across.end) * depth, layer->zero);
    }
    return made;
}

/* The halves of a byte. */
#define LOW(W) ((int32_t)((uint32_t)(W) << 28) >> 28)

#define HIGH(W) ((W) >> 4)

/* A weight of a row of its own. */
static int32_t weight(const int8_t *row, int32_t packed, int32_t i)
{
    return !packed ? row[i] : i % 2 ? HIGH(row[i / 2]) * 16 : LOW(row[i / 2]) * 16;
}

#ifdef DSP
static inline uint32_t word(const void *bytes)
{
    uint32_t four;
    __builtin_memcpy(&four, bytes, sizeof four); /* a load */
    return four;
}
#endif

#ifdef DSP
/* Up to four bytes, and zeros above. */
static uint32_t rest(const void *bytes, int32_t n)
{
    uint32_t last = 0;
    while (n > 0) {
        last = last << 8 | ((const uint8_t *)bytes)[--n];
    }
    return last;
}
#endif

#ifdef DSP
/* Bytes 0 and 2 as int16. */
static inline uint32_t even(uint32_t bytes)
{
    uint32_t pair;
    __asm__("sxtb16 %0, %1" : "=r"(pair) : "r"(bytes));
    return pair;
}
/* Bytes 1 and 3 as int16. */
static inline uint32_t odd(uint32_t bytes)
{
    uint32_t pair;
    __asm__("sxtb16 %0, %1, ror #8" : "=r"(pair) : "r"(bytes));
    return pair;
}
static inline uint32_t even_unsigned(uint32_t bytes)
{
    uint32_t pair;
    __asm__("uxtb16 %0, %1" : "=r"(pair) : "r"(bytes));
    return pair;
}
static inline uint32_t odd_unsigned(uint32_t bytes)
{
    uint32_t pair;
    __asm__("uxtb16 %0, %1, ror #8" : "=r"(pair) : "r"(bytes));
    return pair;
}
#endif

#ifdef DSP
/* Both products of int16, added. */
static inline int32_t dual(uint32_t a, uint32_t b, int32_t sum)
{
    __asm__ volatile("smlad %0, %1, %2, %0" : "+r"(sum) : "r"(a), "r"(b));
    return sum;
}
#endif

#ifdef DSP
/* Two windows as int16: of four entries 0 and 2 of both, then 1 and 3. */
static void spread(const uint8_t *a, const uint8_t *b, uint32_t *to, int32_t n)
{
    for (; n > 0; n -= 4, a += 4, b += 4, to += 4) {
        const uint32_t p = n < 4 ? rest(a, n) : word(a), q = n < 4 ? rest(b, n) : word(b);
        to[0] = even_unsigned(p), to[1] = even_unsigned(q);
        to[2] = odd_unsigned(p), to[3] = odd_unsigned(q);
    }
}
#endif

#ifdef DSP
/* Four entries of two windows with four of two kernels. */
#define SIXTEEN(A, B)                                                                              \
    do {                                                                                           \
        const uint32_t c = (A), d = (B);                                                           \
        uint32_t p = x[0], q = x[1], a = even(c), b = even(d);                                     \
        s00 = dual(p, a, s00), s01 = dual(q, a, s01);                                              \
        s10 = dual(p, b, s10), s11 = dual(q, b, s11);                                              \
        p = x[2], q = x[3], a = odd(c), b = odd(d);                                                \
        s00 = dual(p, a, s00), s01 = dual(q, a, s01);                                              \
        s10 = dual(p, b, s10), s11 = dual(q, b, s11);                                              \
        x += 4;                                                                                    \
    } while (0)
#endif

#ifdef DSP
/* Of one window. */
#define EIGHT(X, A, B)                                                                             \
    do {                                                                                           \
        const uint32_t c = (A), d = (B), p = even_unsigned(X), q = odd_unsigned(X);                \
        s00 = dual(q, odd(c), dual(p, even(c), s00));                                              \
        s10 = dual(q, odd(d), dual(p, even(d), s10));                                              \
    } while (0)
#endif

#ifdef DSP
/* The halves of each byte of a word, times 16. */
#define LOWS(W) ((W) << 4 & 0xF0F0F0F0u)
#define HIGHS(W) ((W)&0xF0F0F0F0u)
#endif

/* One window with two kernels. */
APART static void pair(const uint8_t *x, const int8_t *w, int32_t n, int32_t packed, int32_t *sums)
{
    if (packed) {
        int32_t s00 = 0, s10 = 0;
#ifdef DSP
        for (; n >= 4; n -= 4, x += 4, w += 4) {
            const uint32_t both = word(w);
            EIGHT(word(x), LOWS(both), HIGHS(both));
        }
#endif
        int32_t low = 0, high = 0;
        for (; n > 0; n--, x++, w++) {
            low += *x * LOW(*w), high += *x * HIGH(*w);
        }
        sums[0] += s00 + low * 16, sums[2] += s10 + high * 16;
    } else {
        int32_t s00 = sums[0], s10 = sums[2];
        for (; n >= 4; n -= 4, x += 4, w += 8) {
#ifdef DSP
            EIGHT(word(x), word(w), word(w + 4));
#else
            for (int32_t k = 0; k < 4; k++) {
                s00 += x[k] * w[k], s10 += x[k] * w[4 + k];
            }
#endif
        }
        for (int32_t k = 0; k < n; k++) {
            s00 += x[k] * w[k], s10 += x[k] * w[n + k];
        }
        sums[0] = s00, sums[2] = s10;
    }
}

#ifndef DSP
/* An entry of two windows with one of two kernels. */
#define FOUR(P, Q, A, B)                                                                           \
    do {                                                                                           \
        const int32_t p = (P), q = (Q), a = (A), b = (B);                                          \
        s00 += p * a, s01 += q * a, s10 += p * b, s11 += q * b;                                    \
    } while (0)
#endif

/* Two windows, or columns of them, with two kernels. */
static void square(const void *first, const uint8_t *second, const int8_t *w, int32_t n,
                   int32_t packed, int32_t *sums)
{
#if defined(DSP)
    int32_t s00 = sums[0], s01 = sums[1], s10 = sums[2], s11 = sums[3];
    const uint32_t *x = first;
    (void)second;
    const uint32_t *end = x + (n & ~7);
    if (packed) {
        for (; x < end; w += 8) {
            const uint32_t four = word(w), next = word(w + 4);
            SIXTEEN(LOWS(four), HIGHS(four));
            SIXTEEN(LOWS(next), HIGHS(next));
        }
        for (n &= 7; n > 0; n -= 4, w += 4) {
            const uint32_t four = n < 4 ? rest(w, n) : word(w);
            SIXTEEN(LOWS(four), HIGHS(four));
        }
    } else {
        for (; x < end; w += 16) {
            SIXTEEN(word(w), word(w + 4));
            SIXTEEN(word(w + 8), word(w + 12));
        }
        for (n &= 7; n > 0; n -= 4, w += 8) {
            SIXTEEN(n < 4 ? rest(w, n) : word(w), n < 4 ? rest(w + n, n) : word(w + 4));
        }
    }
    sums[0] = s00, sums[1] = s01, sums[2] = s10, sums[3] = s11;
#elif defined(THUMB_1)
    /* Eight registers hold no more. */
    pair(first, w, n, packed, sums);
    pair(second, w, n, packed, sums + 1);
#else
    const int32_t unit = packed ? 16 : 1;
    int32_t s00 = 0, s01 = 0, s10 = 0, s11 = 0;
    const uint8_t *x = first;
    if (packed) {
        for (const uint8_t *end = x + n; x < end; x++, second++, w++) {
            FOUR(*x, *second, LOW(*w), HIGH(*w));
        }
    } else {
        for (; n >= 4; n -= 4, x += 4, second += 4, w += 8) {
            FOUR(x[0], second[0], w[0], w[4]);
            FOUR(x[1], second[1], w[1], w[5]);
            FOUR(x[2], second[2], w[2], w[6]);
            FOUR(x[3], second[3], w[3], w[7]);
        }
        for (int32_t k = 0; k < n; k++) {
            FOUR(x[k], second[k], w[k], w[n + k]);
        }
    }
    sums[0] += s00 * unit, sums[1] += s01 * unit, sums[2] += s10 * unit, sums[3] += s11 * unit;
#endif
}

/* One or two windows with one kernel. */
static void alone(const void *first, const uint8_t *second, const int8_t *w, int32_t n,
                  int32_t packed, int32_t *sums)
{
    for (int32_t k = 0; k < n; k++) {
        const int32_t a = weight(w, packed, k);
#ifdef DSP
        if (second) {
            const uint32_t *x = (const uint32_t *)first + (k & ~3) + k % 2 * 2;
            const int32_t half = k / 2 % 2 * 16;
            sums[0] += (int32_t)(x[0] >> half & 255) * a;
            sums[1] += (int32_t)(x[1] >> half & 255) * a;
            continue;
        }
#endif
        sums[0] += ((const uint8_t *)first)[k] * a;
        sums[1] += second ? second[k] * a : 0;
    }
}

/* n results of one or two windows: those of the second lie `beyond` after those of the first. */
APART static const int8_t *features_of(const void *first, const uint8_t *second, const int8_t *w,
                                       int32_t size, const Layer *layer, void *y, int32_t i,
                                       int32_t beyond, int32_t o, int32_t n, const Result *to)
{
    const int32_t packed = layer->packed;
    const int32_t low = to->low, high = to->high, zero = to->zero, encoded = to->encoded;
    const int32_t *bias = layer->bias + o;
    const float *multiplier = layer->multiplier + o;
    for (i += o; n > 1; n -= 2, i += 2, bias += 2, multiplier += 2) {
        int32_t sums[4] = {bias[0], bias[0], bias[1], bias[1]};
        if (second) {
            square(first, second, w, size, packed, sums);
        } else {
            pair(first, w, size, packed, sums);
        }
        w += packed ? size : 2 * size;
        const float f = multiplier[0], g = multiplier[1];
        if (encoded) {
            uint8_t *out = (uint8_t *)y + i;
            if (second) {
                out[beyond] = requantize(sums[1], f, low, high, zero);
                out[beyond + 1] = requantize(sums[3], g, low, high, zero);
            }
            out[0] = requantize(sums[0], f, low, high, zero);
            out[1] = requantize(sums[2], g, low, high, zero);
        } else {
            float *out = (float *)y + i;
            if (second) {
                out[beyond] = (float)sums[1] * f;
                out[beyond + 1] = (float)sums[3] * g;
            }
            out[0] = (float)sums[0] * f;
            out[1] = (float)sums[2] * g;
        }
    }
    if (n) {
        int32_t sums[2] = {bias[0], bias[0]};
        alone(first, second, w, size, packed, sums);
        w += packed ? (size + 1) / 2 : size;
        if (second) {
            put(y, i + beyond, sums[1], *multiplier, to);
        }
        put(y, i, sums[0], *multiplier, to);
    }
    return w;
}

/* Two pixels with two kernels at a time. */
static void conv(const uint8_t *x, void *y, const Window *at, const Layer *layer, const Result *to,
                 uint8_t *scratch)
{
    const int32_t depth = at->channels / layer->groups, features = at->features / layer->groups;
    const int32_t size = at->down.window * at->across.window * depth;
    const int32_t columns = at->across.outputs, pixels = at->down.outputs * columns;
#ifdef DSP
    uint32_t *laid = (uint32_t *)(void *)scratch;
    scratch += pixels > 1 ? 4 * ((size + 3) & ~3) : 0;
#endif
    int32_t row = 0, column = 0;
    for (int32_t pixel = 0; pixel < pixels; pixel += 2) {
        const int32_t two = pixel + 1 < pixels;
        const int32_t wraps = column + 1 == columns, below = row + wraps;
        const int32_t beside = wraps ? 0 : column + 1;
        const int8_t *w = layer->weights;
        for (int32_t group = 0; group < layer->groups; group++) {
            const uint8_t *from = x + group * depth;
            const uint8_t *second = 0;
            const void *first = window(from, at, layer, depth, row, column, scratch);
            if (two) {
                second = window(from, at, layer, depth, below, beside, scratch + size);
#ifdef DSP
                spread(first, second, laid, size);
                first = laid;
#endif
            }
            w = features_of(first, second, w, size, layer, y, pixel * at->features,
                            two * at->features, group * features, features, to);
        }
        column = columns == 1 ? 0 : beside + 1;
        row = columns == 1 ? row + 2 : below;
        if (column == columns) {
            column = 0, row++;
        }
    }
}

/* Four channels of a window, whose taps are at these places. */
static inline void four(const uint8_t *x, const int32_t *places, int32_t n, const int8_t *w,
                        int32_t packed, int32_t *sums)
{
    int32_t s0 = sums[0], s1 = sums[1], s2 = sums[2], s3 = sums[3];
    const int32_t *end = places + (n & ~1);
#ifdef DSP
    for (; places < end; places += 2, w += packed ? 4 : 8) {
        __asm__("" : "+r"(places), "+r"(w)); /* two pointers, not one and what is between */
        const uint32_t f = word(x + places[0]), g = word(x + places[1]), both = word(w);
        const uint32_t p = (f & 0xFFFFu) | g << 16, q = (g & 0xFFFF0000u) | f >> 16;
        const uint32_t c = packed ? LOWS(both) : both, d = packed ? HIGHS(both) : word(w + 4);
        s0 = dual(even_unsigned(p), even(c), s0);
        s1 = dual(odd_unsigned(p), odd(c), s1);
        s2 = dual(even_unsigned(q), even(d), s2);
        s3 = dual(odd_unsigned(q), odd(d), s3);
    }
#else
    /* One tap at a time, for which there are registers. */
    for (int32_t step = 2; places < end; w += step, step = packed ? 2 : 8 - step) {
        const uint8_t *a = x + *places++;
        s0 += a[0] * (packed ? LOW(w[0]) * 16 : w[0]);
        s1 += a[1] * (packed ? LOW(w[1]) * 16 : w[1]);
        s2 += a[2] * (packed ? HIGH(w[0]) * 16 : w[4]);
        s3 += a[3] * (packed ? HIGH(w[1]) * 16 : w[5]);
    }
#endif
    if (n & 1) {
        const uint8_t *a = x + places[0];
        s0 += a[0] * (packed ? LOW(w[0]) * 16 : w[0]);
        s1 += a[1] * (packed ? LOW(w[1]) * 16 : w[1]);
        s2 += a[2] * (packed ? HIGH(w[0]) * 16 : w[2]);
        s3 += a[3] * (packed ? HIGH(w[1]) * 16 : w[3]);
    }
    sums[0] = s0, sums[1] = s1, sums[2] = s2, sums[3] = s3;
}

/* n channels of a window, four at a time. */
APART static const int8_t *fours(const uint8_t *x, const int32_t *places, int32_t taps,
                                 const int8_t *w, const Layer *layer, void *y, int32_t i, int32_t n,
                                 const Result *to)
{
    const int32_t packed = layer->packed, step = packed ? 2 * taps : 4 * taps;
    const int32_t low = to->low, high = to->high, zero = to->zero, encoded = to->encoded;
    const int32_t *bias = layer->bias;
    const float *m = layer->multiplier;
    for (; n > 0; n -= 4, x += 4, w += step, i += 4, bias += 4, m += 4) {
        int32_t sums[4] = {bias[0], bias[1], bias[2], bias[3]};
        if (packed) {
            four(x, places, taps, w, 1, sums);
        } else {
            four(x, places, taps, w, 0, sums);
        }
        if (encoded) {
            uint8_t *out = (uint8_t *)y + i;
            out[0] = requantize(sums[0], m[0], low, high, zero);
            out[1] = requantize(sums[1], m[1], low, high, zero);
            out[2] = requantize(sums[2], m[2], low, high, zero);
            out[3] = requantize(sums[3], m[3], low, high, zero);
        } else {
            float *out = (float *)y + i;
            out[0] = (float)sums[0] * m[0], out[1] = (float)sums[1] * m[1];
            out[2] = (float)sums[2] * m[2], out[3] = (float)sums[3] * m[3];
        }
    }
    return w;
}

/* Kernels of four channels lie together, two taps at a time: two channels of both and then the other
   two, packed in the high halves of the same bytes; then an odd last tap alike. Those of up to three
   more channels are rows. */
static void depthwise(const uint8_t *x, void *y, const Window *at, const Layer *layer,
                      const Result *to, uint8_t *scratch)
{
    const int32_t channels = at->channels, across = at->across.window, packed = layer->packed;
    const int32_t n = at->down.window * across, whole = channels & ~3;
    /* Where taps lie on the input, and in a window that is copied. */
    int32_t *spaced = (int32_t *)(void *)scratch, *close = spaced + n;
    for (int32_t i = 0; i < n; i++) {
        const int32_t line = i / across * at->down.dilation * at->across.length;
        spaced[i] = (line + i % across * at->across.dilation) * channels;
        close[i] = i * channels;
    }
    int32_t i = 0;
    for (int32_t row = 0; row < at->down.outputs; row++) {
        const Taps down = taps(&at->down, row);
        for (int32_t column = 0; column < at->across.outputs; column++) {
            const Taps beside = taps(&at->across, column);
            const int32_t inside = (down.end - down.first) * (beside.end - beside.first) == n;
            const int32_t *places = inside ? spaced : close;
            const uint8_t *from =
                inside ? x + (down.start * at->across.length + beside.start) * channels
                       : window(x, at, layer, channels, row, column, (uint8_t *)(close + n));
            const int8_t *w =
                fours(from, places, n, layer->weights, layer, y, i, whole, to);
            for (int32_t c = whole; c < channels; c++, w += packed ? (n + 1) / 2 : n) {
                int32_t sum = layer->bias[c];
                for (int32_t k = 0; k < n; k++) {
                    sum += from[places[k] + c] * weight(w, packed, k);
                }
                put(y, i + c, sum, layer->multiplier[c], to);
            }
            i += channels;
        }
    }
}
