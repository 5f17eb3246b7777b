/* The torch forms of the color transforms (data/transforms/) in C, for the CPU: one call does all operations of a block.
 *
 * Images are worked on as planar bytes, (3, height, width). Every expression is the one of the torch form, operation by
 * operation, in float without fused multiply-adds (-ffp-contract=off), so that both give the same bits; sums are of whole
 * numbers that float holds exactly. Nothing here allocates or keeps state.
 *
 * No operation depends on the position of a pixel but for its neighbors on both sides, so a flip may be done at the end.
 */

#include "resample.h"

enum { BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAY, SOLARIZE, BLUR };

static inline float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }
static inline float least(float a, float b) { return a < b ? a : b; }
static inline float most(float a, float b) { return a > b ? a : b; }

static inline int32_t luma(uint8_t r, uint8_t g, uint8_t b) { return (r * 19595 + g * 38470 + b * 7471 + 32768) >> 16; }

static inline uint8_t blend(float x, float degenerate, float factor) {
    return (uint8_t)(int32_t)clamp((x - degenerate) * factor + degenerate, 0.0f, 255.0f);
}

static void brightness(uint8_t *x, long pixels, float factor) {
    for (long i = 0; i < 3 * pixels; i++) x[i] = (uint8_t)(int32_t)least(x[i] * factor, 255.0f);
}

static void contrast(uint8_t *x, long pixels, float factor) {
    int64_t sum = 0;
    for (long start = 0; start < pixels; start += 4096) {
        long stop = start + 4096 < pixels ? start + 4096 : pixels;
        int32_t part = 0;
        for (long i = start; i < stop; i++) part += luma(x[i], x[i + pixels], x[i + 2 * pixels]);
        sum += part;
    }
    float mean = (float)(int64_t)((double)sum / (double)pixels + 0.5);
    for (long i = 0; i < 3 * pixels; i++) x[i] = blend(x[i], mean, factor);
}

static void saturation(uint8_t *restrict r, uint8_t *restrict g, uint8_t *restrict b, long pixels, float factor) {
    for (long i = 0; i < pixels; i++) {
        float gray = (float)luma(r[i], g[i], b[i]);
        r[i] = blend(r[i], gray, factor);
        g[i] = blend(g[i], gray, factor);
        b[i] = blend(b[i], gray, factor);
    }
}

static void gray(uint8_t *restrict r, uint8_t *restrict g, uint8_t *restrict b, long pixels) {
    for (long i = 0; i < pixels; i++) r[i] = g[i] = b[i] = (uint8_t)luma(r[i], g[i], b[i]);
}

static void solarize(uint8_t *x, long pixels, float threshold) {
    for (long i = 0; i < 3 * pixels; i++) x[i] = x[i] >= threshold ? 255 - x[i] : x[i];
}

static inline uint8_t channel(float value, float below, float distance) {
    float share = clamp(distance, 0.0f, 255.0f) * below * (1.0f / 65025.0f);
    return (uint8_t)(int32_t)(value - share + 0.5f);
}

static void hue(uint8_t *restrict red, uint8_t *restrict green, uint8_t *restrict blue, long pixels, float steps) {
    for (long i = 0; i < pixels; i++) {
        float r = red[i], g = green[i], b = blue[i];
        float value = most(most(r, g), b);
        float chroma = value - least(least(r, g), b);
        float below = (float)(int32_t)(chroma * 255.0f / most(value, 1.0f)) * value;
        float turn = r == value ? g - b : g == value ? 2.0f * chroma + b - r : 4.0f * chroma + r - g;
        float turned = turn * 42.5f / most(chroma, 1.0f);
        float floored = (float)(int32_t)(turned + 256.0f) - 256.0f;
        floored += (turn < 0.0f ? 255.0f : 0.0f) + steps;
        float byte = (float)((int32_t)floored & 255);
        float sector = byte * 6.0f;
        red[i] = channel(value, below, 510.0f - most(sector - 765.0f, 765.0f - sector));
        green[i] = channel(value, below, most(sector - 510.0f, 510.0f - sector) - 255.0f);
        blue[i] = channel(value, below, most(sector - 1020.0f, 1020.0f - sector) - 255.0f);
    }
}

static void to_planes(const uint8_t *restrict x, long pixels, uint8_t *restrict r, uint8_t *restrict g,
                      uint8_t *restrict b) {
    for (long i = 0; i < pixels; i++) {
        r[i] = x[3 * i];
        g[i] = x[3 * i + 1];
        b[i] = x[3 * i + 2];
    }
}

/* One row or column step of the blur: total += weight * (before + after), over a whole row. */
static inline void tap(float *restrict total, const float *before, const float *after, float weight, long width) {
    for (long i = 0; i < width; i++) total[i] += weight * (before[i] + after[i]);
}

static inline long reflect(long i, long length) { return i < 0 ? -i : i >= length ? 2 * (length - 1) - i : i; }

/* scratch: (height + 2) rows of width + 2 * reach floats. */
static void blur(uint8_t *x, long height, long width, const float *horizontal, const float *vertical, long reach,
                 float *scratch) {
    float *total = scratch, *padded = scratch + width + 2 * reach, *rows = padded + width + 2 * reach;
    for (int plane = 0; plane < 3; plane++, x += height * width) {
        for (long y = 0; y < height; y++) {
            const uint8_t *row = x + y * width;
            float *middle = padded + reach;
            for (long i = 0; i < width; i++) middle[i] = row[i];
            for (long i = 1; i <= reach; i++) {
                middle[-i] = row[reflect(-i, width)];
                middle[width - 1 + i] = row[reflect(width - 1 + i, width)];
            }
            for (long i = 0; i < width; i++) total[i] = horizontal[0] * middle[i];
            for (long k = 1; k <= reach; k++) tap(total, middle - k, middle + k, horizontal[k], width);
            for (long i = 0; i < width; i++) rows[y * width + i] = (float)(((int32_t)total[i] + 2048) >> 12);
        }
        for (long y = 0; y < height; y++) {
            for (long i = 0; i < width; i++) total[i] = vertical[0] * rows[y * width + i];
            for (long k = 1; k <= reach; k++)
                tap(total, rows + reflect(y - k, height) * width, rows + reflect(y + k, height) * width, vertical[k], width);
            for (long i = 0; i < width; i++) x[y * width + i] = (uint8_t)(((int32_t)total[i] + 32768) >> 16);
        }
    }
}

/* A row of three planes as pixels. */
static void joined(const uint8_t *restrict r, const uint8_t *restrict g, const uint8_t *restrict b, long width, int flip,
                   uint8_t *restrict out) {
    if (flip) {
        for (long i = 0, from = width - 1; i < width; i++, from--) {
            out[3 * i] = r[from];
            out[3 * i + 1] = g[from];
            out[3 * i + 2] = b[from];
        }
    } else {
        for (long i = 0; i < width; i++) {
            out[3 * i] = r[i];
            out[3 * i + 1] = g[i];
            out[3 * i + 2] = b[i];
        }
    }
}

static void to_pixels(const uint8_t *x, long height, long width, int flip, uint8_t *out) {
    long area = height * width;
    for (long y = 0; y < height; y++)
        joined(x + y * width, x + area + y * width, x + 2 * area + y * width, width, flip, out + 3 * y * width);
}

enum { PATTERN = 48 }; /* numbers after which the channels and the vectors begin anew */

/* row: 3 * width bytes to work in. */
static void normalize(const uint8_t *x, long height, long width, int flip, const float *scale, const float *offset,
                      uint8_t *restrict row, float *restrict out) {
    float scales[PATTERN], offsets[PATTERN];
    for (int i = 0; i < PATTERN; i++) {
        scales[i] = scale[i % 3];
        offsets[i] = offset[i % 3];
    }
    long area = height * width;
    for (long y = 0; y < height; y++, out += 3 * width) {
        joined(x + y * width, x + area + y * width, x + 2 * area + y * width, width, flip, row);
        long i = 0;
        for (; i + PATTERN <= 3 * width; i += PATTERN)
            for (int j = 0; j < PATTERN; j++) out[i + j] = row[i + j] * scales[j] + offsets[j];
        for (int j = 0; i + j < 3 * width; j++) out[i + j] = row[i + j] * scales[j] + offsets[j];
    }
}

/* Bytes of work that `sslrun_views` needs for boxes (count, 4) of images. */
long sslrun_work(const int32_t *boxes, long count, long height, long width, int filter) {
    long bytes = 0;
    for (long n = 0; n < count; n++) {
        long own = resample_work(boxes + 4 * n, height, width, filter);
        if (own > bytes) bytes = own;
    }
    return bytes;
}

/* Does the operations on `count` images, flips them and, where `out` is given, normalizes them.
 *
 * The images are boxes of larger ones, resized; or, where `boxes` is null, `pixels` as they are.
 *
 * images, strides, boxes: (count,) first bytes, bytes from row to row, and (count, 4) top, left, height, width.
 * work: bytes of `sslrun_work`, which start at a multiple of 64. pixels: (count, height, width, 3) bytes. out: (count, height, width, 3) floats, or null: then `bytes` of that shape.
 * operations, values: (count, steps), -1 for none; a blur's value is the row of its taps.
 * horizontal, vertical: (rows, taps), center first. reaches: (rows,) how far a row's taps go.
 * flips: (count,). planes: 3 * height * width bytes to work in. scratch: (height + 2) * (width + 2 * taps) floats.
 */
void sslrun_views(const uint8_t *const *images, const int64_t *strides, const int32_t *boxes, int filter, char *work,
                  const uint8_t *pixels, long count, long height, long width, const int32_t *operations, const float *values,
                  long steps, const float *horizontal, const float *vertical, const int32_t *reaches, long taps,
                  const uint8_t *flips, const float *scale, const float *offset, uint8_t *planes, float *scratch,
                  float *out, uint8_t *bytes) {
    long area = height * width;
    for (long n = 0; n < count; n++) {
        uint8_t *x = planes;
        if (boxes) resample(images[n], (long)strides[n], boxes + 4 * n, height, width, filter, x, work);
        else to_planes(pixels + n * 3 * area, area, x, x + area, x + 2 * area);
        for (long k = 0; k < steps; k++) {
            float value = values[n * steps + k];
            switch (operations[n * steps + k]) {
            case BRIGHTNESS: brightness(x, area, value); break;
            case CONTRAST: contrast(x, area, value); break;
            case SATURATION: saturation(x, x + area, x + 2 * area, area, value); break;
            case HUE: hue(x, x + area, x + 2 * area, area, value); break;
            case GRAY: gray(x, x + area, x + 2 * area, area); break;
            case SOLARIZE: solarize(x, area, value); break;
            case BLUR: {
                long row = (long)value;
                blur(x, height, width, horizontal + row * taps, vertical + row * taps, reaches[row], scratch);
                break;
            }
            }
        }
        if (out) normalize(x, height, width, flips[n], scale, offset, (uint8_t *)scratch, out + n * 3 * area);
        else to_pixels(x, height, width, flips[n], bytes + n * 3 * area);
    }
}
