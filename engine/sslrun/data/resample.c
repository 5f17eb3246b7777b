/* A box of an image resized with a filter, as planar bytes: the bits of torch's `interpolate` of uint8 with antialias.
 *
 * Two passes, one along each axis, with bytes in between. A pass weighs the pixels below the filter with whole numbers
 * of 16 bits, so it is exact in any order: vectors, where the processor has them, give the bits of the plain loops.
 */

#include "resample.h"

#include <string.h>

#if defined(__AVX512VBMI__) && defined(__AVX512BW__)
#include <immintrin.h>
#define LANES 16
typedef __m512i vector;
#define OP(name) _mm512_##name
#define LOAD(p) _mm512_loadu_si512((const void *)(p))
#define STORE(p, v) _mm512_storeu_si512((void *)(p), v)
#define ZERO _mm512_setzero_si512()
#elif defined(__AVX2__)
#include <immintrin.h>
#define LANES 8
typedef __m256i vector;
#define OP(name) _mm256_##name
#define LOAD(p) _mm256_loadu_si256((const __m256i *)(p))
#define STORE(p, v) _mm256_storeu_si256((__m256i *)(p), v)
#define ZERO _mm256_setzero_si256()
#else
#define LANES 1
#endif

enum { MARGIN = 128 }; /* bytes behind a row that may be read: they weigh nothing */
enum { STEP = 16 };    /* taps are filled up with zeros to a multiple of it */

static long rounded_up(long n, long step) { return (n + step - 1) / step * step; }
static long least(long a, long b) { return a < b ? a : b; }
static long most(long a, long b) { return a > b ? a : b; }

static double support(long from, long to, int filter) {
    return (filter == BICUBIC ? 2.0 : 1.0) * (from > to ? (double)from / (double)to : 1.0);
}

static long most_taps(long from, long to, int filter) {
    double reach = support(from, to, filter);
    long whole = (long)reach;
    return 2 * (whole + (reach > (double)whole)) + 1;
}

static double height_of_filter(int filter, double x) {
    x = x < 0 ? -x : x;
    if (filter == BILINEAR) return x < 1.0 ? 1.0 - x : 0.0;
    if (x < 1.0) return (1.5 * x - 2.5) * x * x + 1.0;
    return x < 2.0 ? ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0 : 0.0;
}

/* What one axis needs: for each new pixel the first old one below the filter, and the weights from there on.
 *
 * weights: (length, taps). lanes: (groups, taps / 2, LANES) pairs of weights, for LANES new pixels at a time, and
 * picks: which bytes of a window go to which lane. pairs: 0 where a window is too small, or there are no vectors. */
typedef struct {
    long taps, precision, pairs;
    int32_t *first;
    int16_t *weights, *lanes;
    uint8_t *picks;
    double *real;
} axis;

static char *taken(char **work, long bytes) {
    char *start = *work;
    *work += rounded_up(bytes, 64);
    return start;
}

static axis placed_axis(char **work, long from, long to, int filter) {
    axis a;
    long room = rounded_up(to, 16);
    a.taps = rounded_up(most_taps(from, to, filter) + 1, STEP);
    a.first = (int32_t *)taken(work, room * (long)sizeof(int32_t));
    a.weights = (int16_t *)taken(work, room * a.taps * (long)sizeof(int16_t));
    a.lanes = (int16_t *)taken(work, room * a.taps * (long)sizeof(int16_t));
    a.picks = (uint8_t *)taken(work, room * 4);
    a.real = (double *)taken(work, room * a.taps * (long)sizeof(double));
    return a;
}

/* Weights in double, divided by their sum; then as whole numbers with as many bits as the largest leaves in 16. */
static void weigh(axis *a, long from, long to, int filter) {
    double scale = (double)from / (double)to, inverse = scale >= 1.0 ? 1.0 / scale : 1.0;
    double reach = support(from, to, filter), largest = 0.0;
    long limit = most_taps(from, to, filter), taps = 0;
    for (long i = 0; i < to; i++) {
        double center = scale * ((double)i + 0.5), sum = 0.0, *w = a->real + i * a->taps;
        long first = most((long)(center - reach + 0.5), 0);
        long count = least((long)(center + reach + 0.5), from) - first;
        count = most(0, least(count, limit));
        for (long k = 0; k < count; k++) {
            w[k] = height_of_filter(filter, ((double)(k + first) - center + 0.5) * inverse);
            sum += w[k];
        }
        for (long k = 0; k < count; k++) {
            if (sum != 0.0) w[k] /= sum;
            largest = w[k] > largest ? w[k] : largest;
        }
        for (long k = count; k < a->taps; k++) w[k] = 0.0;
        a->first[i] = (int32_t)first;
        taps = most(taps, count);
    }
    a->precision = 0;
    while (a->precision < 22 && (int)(0.5 + largest * (1 << (a->precision + 1))) < 1 << 15) a->precision++;
    double unit = 1 << a->precision;
    for (long i = 0; i < to * a->taps; i++) {
        double w = a->real[i] * unit;
        a->weights[i] = (int16_t)(w < 0 ? w - 0.5 : w + 0.5);
    }
    a->pairs = LANES > 1 ? (taps + 1) / 2 : 0;
}

#if LANES > 1

/* A window is 64 bytes for 16 lanes, or 16 bytes for each 4 of 8 lanes. A lane gets two neighbors as 16-bit numbers. */
static inline vector window(const uint8_t *row, const int32_t *first, vector picks) {
#if LANES == 16
    return _mm512_maskz_permutexvar_epi8(0x5555555555555555, picks, LOAD(row + first[0]));
#else
    __m128i low = _mm_loadu_si128((const __m128i *)(row + first[0]));
    __m128i high = _mm_loadu_si128((const __m128i *)(row + first[4]));
    return _mm256_shuffle_epi8(_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1), picks);
#endif
}

static inline void store_lanes(uint8_t *to, vector total, long precision) {
    total = OP(srai_epi32)(total, (int)precision);
#if LANES == 16
    _mm_storeu_si128((__m128i *)to, _mm512_cvtusepi32_epi8(_mm512_max_epi32(total, ZERO)));
#else
    total = _mm256_packus_epi16(_mm256_packs_epi32(total, total), total);
    int32_t low = _mm_cvtsi128_si32(_mm256_castsi256_si128(total));
    int32_t high = _mm_cvtsi128_si32(_mm256_extracti128_si256(total, 1));
    memcpy(to, &low, 4);
    memcpy(to + 4, &high, 4);
#endif
}

/* Weights and picks for LANES new pixels at a time, or not if some of them lie too far apart. */
static void arrange(axis *a, long to) {
    long pairs = a->pairs, within = LANES == 16 ? 16 : 4, bytes = LANES == 16 ? 64 : 16;
    for (long i = to; i < rounded_up(to, LANES); i++) {
        a->first[i] = a->first[to - 1];
        memset(a->weights + i * a->taps, 0, a->taps * sizeof(int16_t));
    }
    for (long i = 0; i < rounded_up(to, LANES); i++) {
        long offset = a->first[i] - a->first[i / within * within];
        if (offset + 1 >= bytes) {
            a->pairs = 0;
            return;
        }
        uint8_t *pick = a->picks + 4 * i;
        pick[0] = (uint8_t)offset;
        pick[2] = (uint8_t)(offset + 1);
        pick[1] = pick[3] = 0x80; /* zero */
        for (long k = 0; k < pairs; k++)
            memcpy(a->lanes + ((i / LANES * pairs + k) * LANES + i % LANES) * 2, a->weights + i * a->taps + 2 * k, 4);
    }
}

static void along_row_vectors(const axis *a, const uint8_t *const rows[3], long to, uint8_t *const out[3]) {
    long pairs = a->pairs;
    const int16_t *weights = a->lanes;
    vector half = OP(set1_epi32)(1 << (a->precision - 1));
    for (long i = 0; i < to; i += LANES) {
        vector picks = LOAD(a->picks + 4 * i), red = half, green = half, blue = half;
        for (long k = 0; k < pairs; k++, weights += 2 * LANES) {
            vector pair = LOAD(weights);
            red = OP(add_epi32)(red, OP(madd_epi16)(window(rows[0] + 2 * k, a->first + i, picks), pair));
            green = OP(add_epi32)(green, OP(madd_epi16)(window(rows[1] + 2 * k, a->first + i, picks), pair));
            blue = OP(add_epi32)(blue, OP(madd_epi16)(window(rows[2] + 2 * k, a->first + i, picks), pair));
        }
        store_lanes(out[0] + i, red, a->precision);
        store_lanes(out[1] + i, green, a->precision);
        store_lanes(out[2] + i, blue, a->precision);
    }
}

static inline void rows_at(const uint8_t *row, long stride, const int16_t *weights, long taps, long precision, uint8_t *out) {
    vector half = OP(set1_epi32)(1 << (precision - 1)), a = half, b = half, c = half, d = half;
    for (long k = 0; k < taps; k += 2, row += 2 * stride) {
        int32_t both;
        memcpy(&both, weights + k, 4);
        /* The last row may have no successor. */
        vector one = LOAD(row), other = weights[k + 1] ? LOAD(row + stride) : ZERO, pair = OP(set1_epi32)(both);
        vector low = OP(unpacklo_epi8)(one, other), high = OP(unpackhi_epi8)(one, other);
        a = OP(add_epi32)(a, OP(madd_epi16)(OP(unpacklo_epi8)(low, ZERO), pair));
        b = OP(add_epi32)(b, OP(madd_epi16)(OP(unpackhi_epi8)(low, ZERO), pair));
        c = OP(add_epi32)(c, OP(madd_epi16)(OP(unpacklo_epi8)(high, ZERO), pair));
        d = OP(add_epi32)(d, OP(madd_epi16)(OP(unpackhi_epi8)(high, ZERO), pair));
    }
    int bits = (int)precision;
    a = OP(packs_epi32)(OP(srai_epi32)(a, bits), OP(srai_epi32)(b, bits));
    c = OP(packs_epi32)(OP(srai_epi32)(c, bits), OP(srai_epi32)(d, bits));
    STORE(out, OP(packus_epi16)(a, c));
}

#endif

static inline uint8_t byte(int32_t total, int precision) {
    total >>= precision;
    return (uint8_t)(total < 0 ? 0 : total > 255 ? 255 : total);
}

/* taps: a multiple of STEP. */
static inline int32_t sum_of_taps(const uint8_t *x, const int16_t *weights, long taps) {
#if LANES > 1
    __m256i sums = _mm256_setzero_si256();
    for (long k = 0; k < taps; k += STEP) {
        __m256i pixels = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(x + k)));
        sums = _mm256_add_epi32(sums, _mm256_madd_epi16(pixels, _mm256_loadu_si256((const __m256i *)(weights + k))));
    }
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
#else
    int32_t total = 0;
    for (long k = 0; k < taps; k++) total += weights[k] * x[k];
    return total;
#endif
}

/* New pixels of a row of each channel; a row may be read for MARGIN bytes, and `out` written to a multiple of 16. */
static void along_row(const axis *a, const uint8_t *const rows[3], long to, uint8_t *const out[3]) {
#if LANES > 1
    if (a->pairs) {
        along_row_vectors(a, rows, to, out);
        return;
    }
#endif
    for (int channel = 0; channel < 3; channel++) {
        for (long i = 0; i < to; i++) {
            const uint8_t *x = rows[channel] + a->first[i];
            const int16_t *w = a->weights + i * a->taps;
            out[channel][i] = byte(sum_of_taps(x, w, a->taps) + (1 << (a->precision - 1)), (int)a->precision);
        }
    }
}

/* A new row from the old rows at `rows`. total: `width` numbers to work in. */
static void across_rows(const axis *a, const uint8_t *rows, long stride, long width, long i, uint8_t *out, int32_t *total) {
    const int16_t *weights = a->weights + i * a->taps;
    const uint8_t *row = rows + a->first[i] * stride;
    long taps = a->taps;
    while (taps > 1 && weights[taps - 1] == 0) taps--;
#if LANES > 1
    if (width >= 4 * LANES) { /* the last vector overlaps with the one before */
        for (long x = 0; x < width; x += 4 * LANES) {
            long at = least(x, width - 4 * LANES);
            rows_at(row + at, stride, weights, taps, a->precision, out + at);
        }
        return;
    }
#endif
    for (long x = 0; x < width; x++) total[x] = 1 << (a->precision - 1);
    for (long k = 0; k < taps; k++, row += stride)
        for (long x = 0; x < width; x++) total[x] += weights[k] * row[x];
    for (long x = 0; x < width; x++) out[x] = byte(total[x], (int)a->precision);
}

static void split_row(const uint8_t *restrict row, long width, uint8_t *restrict r, uint8_t *restrict g,
                      uint8_t *restrict b) {
    for (long i = 0; i < width; i++) {
        r[i] = row[3 * i];
        g[i] = row[3 * i + 1];
        b[i] = row[3 * i + 2];
    }
}

/* Where all parts of the work lie; the same for counting them and for using them. */
typedef struct {
    axis across, down;
    uint8_t *rows[3], *new_rows[3], *whole_row, *middle;
    int32_t *total;
    long middle_width;
} places;

static places placed(char **work, const int32_t *box, long height, long width, int filter) {
    places p;
    p.across = placed_axis(work, box[3], width, filter);
    p.down = placed_axis(work, box[2], height, filter);
    p.middle_width = rounded_up(width, 64);
    for (int channel = 0; channel < 3; channel++) {
        p.rows[channel] = (uint8_t *)taken(work, box[3] + p.across.taps + MARGIN);
        p.new_rows[channel] = (uint8_t *)taken(work, p.middle_width);
    }
    p.whole_row = (uint8_t *)taken(work, 3 * box[3]);
    p.total = (int32_t *)taken(work, (3 * box[3] + width) * (long)sizeof(int32_t));
    p.middle = (uint8_t *)taken(work, 3 * box[2] * p.middle_width);
    return p;
}

long resample_work(const int32_t *box, long height, long width, int filter) {
    char *end = 0;
    placed(&end, box, height, width, filter);
    return end - (char *)0;
}

void resample(const uint8_t *image, long stride, const int32_t *box, long height, long width, int filter, uint8_t *planes,
              char *work) {
    long area = height * width, old_height = box[2], old_width = box[3];
    int is_wide = old_width != width, is_high = old_height != height;
    places p = placed(&work, box, height, width, filter);
    if (is_wide) {
        weigh(&p.across, old_width, width, filter);
#if LANES > 1
        arrange(&p.across, width);
#endif
    }
    if (is_high) weigh(&p.down, old_height, height, filter);
    image += box[0] * stride + 3 * box[1];
    /* Pillow's rule since version 13: the height goes first where it shrinks by more than twice what the width does. */
    int down_first = !is_wide || old_height - height > most(0, 2 * (old_width - width));
    long rows = down_first || !is_high ? height : old_height;
    for (long y = 0; y < rows; y++) {
        const uint8_t *row = image + y * stride;
        if (down_first && is_high) {
            across_rows(&p.down, image, stride, 3 * old_width, y, p.whole_row, p.total);
            row = p.whole_row;
        }
        split_row(row, old_width, p.rows[0], p.rows[1], p.rows[2]);
        if (!down_first && is_high) {
            uint8_t *to = p.middle + y * p.middle_width, *out[3];
            for (int channel = 0; channel < 3; channel++) out[channel] = to + channel * old_height * p.middle_width;
            along_row(&p.across, (const uint8_t *const *)p.rows, width, out);
        } else {
            if (is_wide) along_row(&p.across, (const uint8_t *const *)p.rows, width, p.new_rows);
            for (int channel = 0; channel < 3; channel++)
                memcpy(planes + channel * area + y * width, is_wide ? p.new_rows[channel] : p.rows[channel], width);
        }
    }
    if (down_first || !is_high) return;
    for (int channel = 0; channel < 3; channel++) {
        const uint8_t *middle = p.middle + channel * old_height * p.middle_width;
        for (long y = 0; y < height; y++)
            across_rows(&p.down, middle, p.middle_width, width, y, planes + channel * area + y * width, p.total);
    }
}
