// Padded images: one group of one image as floats, pixel after pixel, with zeros around it. Every corner of every
// sample then has an address of its own, whose value is read (or added to) without asking whether it lies in the image.
// It also brings together what, in the input, lies a whole pixel of all groups apart: cache sets and pages are used
// evenly.
//
// A row is a zero pixel and the width_in pixels of the image; the zero pixel that ends a row is the next row's first.
// Above and below lies a row of zeros, and two pixels more, so that all four corners of a sample at pixel_nowhere() do.

inline int64_t pixel_nowhere(const Problem& q) { return q.padded_pixels - q.padded_width - 2; }

// Where row y begins, the zero pixel before it not counted.
inline int64_t padded_row(const Problem& q, int64_t y) { return (y + 1) * q.padded_width + 1; }

inline int64_t image_floats(const Problem& q) { return q.padded_pixels * q.p.group_channels; }

inline void clear(float* to, int64_t count) {
  __builtin_memset(to, 0, static_cast<std::size_t>(count) * sizeof(float));
}

// The first channel of a unit (n * groups + g) in a tensor of the input's size.
template <class T>
inline T* unit_of(const Problem& q, T* tensor, int64_t unit, int64_t pixel_stride) {
  const auto& p = q.p;
  return tensor + unit / p.groups * p.height_in * p.width_in * pixel_stride + unit % p.groups * p.group_channels;
}

template <class T>
void pad_line(const Problem& q, const T* input, int64_t unit, int64_t y, float* image) {
  const auto& p = q.p;
  const int channels = p.group_channels;
  if (y == p.height_in) {
    clear(image, q.padded_width * channels);
    clear(image + pixel_nowhere(q) * channels, (q.padded_width + 2) * channels);
    return;
  }
  const T* from = unit_of(q, input, unit, p.input_pixel_stride) + y * p.width_in * p.input_pixel_stride;
  float* to = image + padded_row(q, y) * channels;
  clear(to - channels, channels);
  for (int64_t x = 0; x < p.width_in; ++x) convert(to + x * channels, from + x * p.input_pixel_stride, channels);
}

template <class T>
void pad_lines(const Problem& q, const void* input, float* images, int64_t first, int64_t last) {
  const int64_t lines = q.p.height_in + 1;
  for (int64_t line = first; line < last; ++line) {
    const int64_t unit = line / lines;
    pad_line(q, static_cast<const T*>(input), unit, line % lines, images + unit * image_floats(q));
  }
}

template <class T>
void pad_unit(const Problem& q, const void* input, int64_t unit, float* image) {
  for (int64_t y = 0; y <= q.p.height_in; ++y) pad_line(q, static_cast<const T*>(input), unit, y, image);
}
