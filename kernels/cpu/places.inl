// Where the samples of a block of output pixels lie: computed once for each (pixel, group), whatever the channels.

// A block: up to kMaxSamples samples of neighbouring output pixels of one row and one group. Sample s = pixel * taps +
// tap. The arrays are filled up to a multiple of kPad, so that the loops over them need no tail.
struct Block {
  static constexpr int kPad = 16;
  int pixels, samples;
  alignas(64) float x[kMaxSamples], y[kMaxSamples];  // offset_scale * (grid + offset); later the distances lx, ly
  alignas(64) float column[kMaxSamples];             // the pixel's origin in x; a whole number
  alignas(64) float mask[kMaxSamples];               // after softmax
  alignas(64) int32_t counts[kMaxSamples];           // 1 where -1 < x < W and -1 < y < H, 0 elsewhere
  // For the corners y0x0, y0x1, y1x0, y1x1: mask * bilinear weight, 0 where the sample does not count; the pixel's
  // index in the image, -1 outside; the addresses of the group's channels there, in the input and in grad_input.
  alignas(64) float weight[4][kMaxSamples];
  alignas(64) int32_t pixel[4][kMaxSamples];
  alignas(64) const char* source[4][kMaxSamples];
  alignas(64) char* target[4][kMaxSamples];
};
static_assert(kMaxSamples % Block::kPad == 0, "whole vectors");

struct Row {  // one output row of one group
  int64_t image, y;
  int group;
};

inline Row row_of(const dcngen_dcnv4_params& p, int64_t row) {
  const int64_t line = row / p.groups;
  return {line / p.height_out, line % p.height_out, static_cast<int>(row % p.groups)};
}

// The 3 * taps values of one (pixel, group) as floats: in place where they are floats already.
inline const float* as_floats(const float* from, float*, int) { return from; }
template <class T>
inline const float* as_floats(const T* from, float* buffer, int count) {
  convert(buffer, from, count);
  return buffer;
}

// Spreads the offsets and masks of a block over its arrays. kTaps: the number of taps where known, else 0.
template <int kTaps, class T>
inline void read_samples(const Problem& q, const T* from, int64_t first_x, Block& b) {
  const int taps = kTaps ? kTaps : q.taps;
  const float scale = q.p.offset_scale;
  float buffer[3 * kMaxSamples];
  int s = 0;
  for (int pixel = 0; pixel < b.pixels; ++pixel, from += q.p.offset_mask_pixel_stride) {
    const float* values = as_floats(from, buffer, 3 * taps);
    const float column = static_cast<float>(q.origin_x + (first_x + pixel) * q.p.stride_w);
    for (int k = 0; k < taps; ++k, ++s) {
      b.x[s] = scale * (q.grid_x[k] + values[2 * k]);
      b.y[s] = scale * (q.grid_y[k] + values[2 * k + 1]);
      b.mask[s] = values[2 * taps + k];
      b.column[s] = column;
    }
  }
  for (; s % Block::kPad; ++s) b.x[s] = b.y[s] = b.mask[s] = b.column[s] = 0.f;
}

// exp for x <= 0, about one unit in the last place; 0 below the smallest normal number. Written out so that it
// vectorises: x = n ln 2 + r, a polynomial for exp(r) (Cephes, expf), 2^n through the exponent bits.
inline float exp_nonpositive(float x) {
  const float clamped = x < -87.f ? -87.f : x;  // NaN stays NaN
  const float n = __builtin_floorf(clamped * 1.44269504f + 0.5f);
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float poly = 1.9875691500e-4f;
  poly = poly * r + 1.3981999507e-3f;
  poly = poly * r + 8.3334519073e-3f;
  poly = poly * r + 4.1665795894e-2f;
  poly = poly * r + 1.6666665459e-1f;
  poly = poly * r + 5.0000001201e-1f;
  const float value = poly * r * r + r + 1.f;
  const int32_t exponent = static_cast<int32_t>(n == n ? n : 0.f) + 127;
  return x < -87.f ? 0.f : value * bits_as<float>(exponent << 23);
}

// Masks of a block through softmax, pixel by pixel.
inline void softmax_masks(int taps, Block& b) {
  for (int first = 0; first < b.samples; first += taps) {
    float top = b.mask[first];
    for (int k = 1; k < taps; ++k) top = b.mask[first + k] > top ? b.mask[first + k] : top;
    for (int k = 0; k < taps; ++k) b.mask[first + k] -= top;
  }
  for (int first = 0; first < b.samples; first += Block::kPad) {
    for (int s = first; s < first + Block::kPad; ++s) b.mask[s] = exp_nonpositive(b.mask[s]);
  }
  for (int first = 0; first < b.samples; first += taps) {
    float sum = 0.f;
    for (int k = 0; k < taps; ++k) sum += b.mask[first + k];
    const float inverse = 1.f / sum;
    for (int k = 0; k < taps; ++k) b.mask[first + k] *= inverse;
  }
}

// Corners and weights of every sample. The whole and the fractional part of a coordinate are kept apart, so the
// fractions are as exact at the far end of a wide map as at its start. Selects rather than branches or products with 0:
// a NaN or far coordinate, or its mask, reaches no weight.
inline void locate(const Problem& q, float line, Block& b) {
  const float width = static_cast<float>(q.p.width_in), height = static_cast<float>(q.p.height_in);
  const int32_t columns = static_cast<int32_t>(q.p.width_in), lines = static_cast<int32_t>(q.p.height_in);
  for (int first = 0; first < b.samples; first += Block::kPad) {
    for (int s = first; s < first + Block::kPad; ++s) {
      const float floor_x = __builtin_floorf(b.x[s]), floor_y = __builtin_floorf(b.y[s]);
      const float fx = b.x[s] - floor_x, fy = b.y[s] - floor_y;
      const float gx = b.column[s] + floor_x, gy = line + floor_y;
      const bool counts = (gx >= (fx > 0.f ? -1.f : 0.f)) & (gx < width) &
                          (gy >= (fy > 0.f ? -1.f : 0.f)) & (gy < height);
      const int32_t x0 = static_cast<int32_t>(counts ? gx : 0.f), y0 = static_cast<int32_t>(counts ? gy : 0.f);
      const float lx = counts ? fx : 0.f, ly = counts ? fy : 0.f, m = counts ? b.mask[s] : 0.f;
      const bool left = counts & (x0 >= 0), right = counts & (x0 + 1 < columns);
      const bool top = y0 >= 0, bottom = y0 + 1 < lines;
      const int32_t corner = y0 * columns + x0;
      b.pixel[0][s] = top & left ? corner : -1;
      b.pixel[1][s] = top & right ? corner + 1 : -1;
      b.pixel[2][s] = bottom & left ? corner + columns : -1;
      b.pixel[3][s] = bottom & right ? corner + columns + 1 : -1;
      const float upper = m * (1.f - ly), lower = m * ly;
      b.weight[0][s] = upper * (1.f - lx);
      b.weight[1][s] = upper * lx;
      b.weight[2][s] = lower * (1.f - lx);
      b.weight[3][s] = lower * lx;
      b.x[s] = lx;
      b.y[s] = ly;
      b.counts[s] = counts;
    }
  }
}

// Pixel indices to addresses: `base` + index * `stride` bytes, `outside` for corners outside the image. In integers,
// since a vector of pointers cannot be selected from.
template <class Pointer>
inline void resolve(const Block& b, const void* base, int64_t stride, const void* outside,
                    Pointer (&to)[4][kMaxSamples]) {
  const int64_t begin = reinterpret_cast<int64_t>(base), fallback = reinterpret_cast<int64_t>(outside);
  for (int c = 0; c < 4; ++c) {
    for (int first = 0; first < b.samples; first += Block::kPad) {
      for (int s = first; s < first + Block::kPad; ++s) {
        const int64_t index = b.pixel[c][s];
        to[c][s] = reinterpret_cast<Pointer>(index < 0 ? fallback : begin + index * stride);
      }
    }
  }
}

// Fills a block with the samples of output pixels [first_x, first_x + pixels) of a row, apart from the addresses.
template <class T>
inline void find_places(const Problem& q, const void* offset_mask, const Row& row, int64_t first_x, int pixels,
                        Block& b) {
  const auto& p = q.p;
  b.pixels = pixels;
  b.samples = pixels * q.taps;
  const int64_t pixel = (row.image * p.height_out + row.y) * p.width_out + first_x;
  const T* from = static_cast<const T*>(offset_mask) + pixel * p.offset_mask_pixel_stride +
                  int64_t{3} * q.taps * row.group;
  if (q.taps == 9) {
    read_samples<9>(q, from, first_x, b);
  } else {
    read_samples<0>(q, from, first_x, b);
  }
  if (p.softmax) softmax_masks(q.taps, b);
  locate(q, static_cast<float>(q.origin_y + row.y * p.stride_h), b);
}

// Calls run(first_x, pixels) for each block of an output row.
template <class Run>
inline void for_each_block(const Problem& q, Run run) {
  const int most = kMaxSamples / q.taps;
  for (int64_t x = 0; x < q.p.width_out; x += most) {
    const int64_t rest = q.p.width_out - x;
    run(x, static_cast<int>(rest < most ? rest : most));
  }
}

// The first channel of a group at the first pixel of an image.
template <class T>
inline const T* group_of(const dcngen_dcnv4_params& p, const void* input, int64_t image, int group) {
  return static_cast<const T*>(input) + image * p.height_in * p.width_in * p.input_pixel_stride +
         int64_t{group} * p.group_channels;
}
