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

typedef struct {
    const int8_t *weights; /* [features][window down][window across][channels / groups] */
    const int32_t *bias;
    const float *multiplier;
    int32_t groups;
    int32_t packed; /* 1: two weights to a byte, low half first, a kernel in whole bytes */
    int32_t zero;   /* of the input */
} Layer;

typedef struct {
    float low;
    float high;
    int32_t zero;
    int32_t encoded; /* 0: a float */
} Result;

/* Channels that are summed together in a depthwise window. */
enum { BLOCK = 16 };

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

/* Where floats are computed by software: the product with 16 bits of fraction, which is within 2^-16
   of that of floats, and so to be rounded alike but next to a half; beyond 2^16 it is clamped. */
static uint8_t requantize(int32_t sum, float multiplier, float low, float high, int32_t zero)
{
#if defined(__arm__) && !defined(__ARM_FP)
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
            const int32_t least = (int32_t)low, most = (int32_t)high;
            return (uint8_t)((q < least ? least : q > most ? most : q) + zero);
        }
    }
#endif
    return nearest((float)sum * multiplier, low, high, zero);
}

/* A NaN becomes the zero point. */
static uint8_t quantize(float x, float multiplier, float low, float high, int32_t zero)
{
    const float steps = x * multiplier;
    return nearest(steps == steps ? steps : 0.0f, low, high, zero);
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
        ((float *)y)[i] = clamp((float)sum * multiplier, to->low, to->high);
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

/* Each half of a byte, two's complement, becomes eight times what it is. */
static const int8_t *unpack(const int8_t *packed, uint8_t *to, int32_t n)
{
    for (int32_t i = 0; i < n; i++) {
        const int32_t half = (uint8_t)packed[i / 2] >> 4 * (i % 2) & 15;
        to[i] = (uint8_t)(8 * ((half ^ 8) - 8));
    }
    return (const int8_t *)to;
}

#if defined(__ARM_FEATURE_DSP) && defined(__GNUC__)
/* Four bytes, of which an even and an odd pair are widened at a time. */
static uint32_t word(const void *bytes)
{
    uint32_t four;
    __builtin_memcpy(&four, bytes, sizeof four); /* a load, without a C library too */
    return four;
}
#endif

/* Two runs of the input with two of kernels. Inlined it spills its sums, above all with -Os. */
#ifdef __GNUC__
__attribute__((noinline))
#endif
static void square(const uint8_t *x, int32_t x_next, const int8_t *w, int32_t w_next, int32_t n,
                   int32_t zero, int32_t *sums)
{
    int32_t s00 = sums[0], s01 = sums[1], s10 = sums[2], s11 = sums[3];
    const uint8_t *end = x + n;
#if defined(__ARM_FEATURE_DSP) && defined(__GNUC__)
    const uint32_t minus = (uint32_t)(-zero & 65535) * 65537u;
    for (; end - x >= 4; x += 4, w += 4) {
        const uint32_t p = word(x), q = word(x + x_next), a = word(w), b = word(w + w_next);
        const uint32_t p0 = __uxtab16(minus, p), p1 = __uxtab16(minus, __ror(p, 8));
        const uint32_t q0 = __uxtab16(minus, q), q1 = __uxtab16(minus, __ror(q, 8));
        const uint32_t a0 = __sxtb16(a), a1 = __sxtb16(__ror(a, 8));
        const uint32_t b0 = __sxtb16(b), b1 = __sxtb16(__ror(b, 8));
        s00 = __smlad(p1, a1, __smlad(p0, a0, s00));
        s01 = __smlad(q1, a1, __smlad(q0, a0, s01));
        s10 = __smlad(p1, b1, __smlad(p0, b0, s10));
        s11 = __smlad(q1, b1, __smlad(q0, b0, s11));
    }
#endif
    for (; x < end; x++, w++) {
        const int16_t p = (int16_t)(x[0] - zero), q = (int16_t)(x[x_next] - zero);
        const int16_t a = w[0], b = w[w_next];
        s00 += (int32_t)p * a;
        s01 += (int32_t)q * a;
        s10 += (int32_t)p * b;
        s11 += (int32_t)q * b;
    }
    sums[0] = s00, sums[1] = s01, sums[2] = s10, sums[3] = s11;
}

/* Two kernels at two pixels at once, where both have the same taps. */
static void conv(const uint8_t *x, void *y, const Window *at, const Layer *layer, const Result *to,
                 uint8_t *unpacked)
{
    const int32_t depth = at->channels / layer->groups, features = at->features / layer->groups;
    const int32_t size = at->down.window * at->across.window * depth;
    const int32_t bytes = layer->packed ? (size + 1) / 2 : size;
    /* Taps side by side are side by side in the input and in the kernel. */
    const int32_t whole = layer->groups == 1 && at->across.dilation == 1;
    for (int32_t o = 0, last; o < at->features; o = last + 1) {
        last = (o + 1) % features ? o + 1 : o;
        const uint8_t *group = x + o / features * depth;
        const int8_t *kernel = layer->weights + o * bytes;
        if (layer->packed) {
            unpack(layer->weights + last * bytes, unpacked + (last - o) * size, size);
            kernel = unpack(kernel, unpacked, size);
        }
        int32_t i = 0;
        for (int32_t row = 0; row < at->down.outputs; row++) {
            const Taps down = taps(&at->down, row);
            for (int32_t column = 0, beside; column < at->across.outputs; column += beside + 1) {
                const Taps across = taps(&at->across, column);
                const Taps next = taps(&at->across, column + 1);
                beside = column + 1 < at->across.outputs && next.first == across.first &&
                         next.end == across.end;
                const int32_t run = whole ? across.end - across.first : 1;
                int32_t sums[4] = {layer->bias[o], layer->bias[o], layer->bias[last],
                                   layer->bias[last]};
                for (int32_t k = down.first; k < down.end; k++) {
                    const int32_t line = (down.start + k * at->down.dilation) * at->across.length;
                    for (int32_t l = across.first; l < across.end; l += run) {
                        const int32_t pixel = line + across.start + l * at->across.dilation;
                        square(group + pixel * at->channels,
                               beside * at->across.stride * at->channels,
                               kernel + (k * at->across.window + l) * depth, (last - o) * size,
                               run * depth, layer->zero, sums);
                    }
                }
                for (int32_t j = 0; j <= beside; j++, i += at->features) {
                    put(y, i + o, sums[j], layer->multiplier[o], to);
                    put(y, i + last, sums[2 + j], layer->multiplier[last], to);
                }
            }
        }
    }
}

/* Weights are [window down][window across][channels]: the channels side by side. */
static void depthwise(const uint8_t *x, void *y, const Window *at, const Layer *layer,
                      const Result *to, uint8_t *unpacked)
{
    const int32_t channels = at->channels;
    const int32_t size = at->down.window * at->across.window * channels;
    const int8_t *kernel =
        layer->packed ? unpack(layer->weights, unpacked, size) : layer->weights;
    for (int32_t first = 0; first < channels; first += BLOCK) {
        const int32_t n = channels - first < BLOCK ? channels - first : BLOCK;
        int32_t i = first;
        for (int32_t row = 0; row < at->down.outputs; row++) {
            const Taps down = taps(&at->down, row);
            for (int32_t column = 0; column < at->across.outputs; column++) {
                const Taps across = taps(&at->across, column);
                int32_t sums[BLOCK];
                for (int32_t c = 0; c < n; c++) {
                    sums[c] = layer->bias[first + c];
                }
                for (int32_t k = down.first; k < down.end; k++) {
                    const int32_t line = (down.start + k * at->down.dilation) * at->across.length;
                    for (int32_t l = across.first; l < across.end; l++) {
                        const int32_t pixel = line + across.start + l * at->across.dilation;
                        const uint8_t *values = x + pixel * channels + first;
                        const int8_t *w = kernel + (k * at->across.window + l) * channels + first;
                        for (int32_t c = 0; c < n; c++) {
                            sums[c] += (int32_t)(int16_t)(values[c] - layer->zero) * w[c];
                        }
                    }
                }
                for (int32_t c = 0; c < n; c++) {
                    put(y, i + c, sums[c], layer->multiplier[first + c], to);
                }
                i += channels;
            }
        }
    }
}
