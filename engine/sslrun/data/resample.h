#include <stdint.h>

enum { BILINEAR, BICUBIC };

/* Bytes of work that `resample` needs. box: top, left, height and width in the image. */
long resample_work(const int32_t *box, long height, long width, int filter);

/* Resizes a box of an image, (H, W, 3) bytes with `stride` bytes from row to row, to planes, (3, height, width) bytes. */
void resample(const uint8_t *image, long stride, const int32_t *box, long height, long width, int filter, uint8_t *planes,
              char *work);
