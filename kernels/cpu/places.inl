// Where the samples of a block of output pixels lie: computed once for each (pixel, group), whatever the channels.

// A block: up to kMaxSamples samples of neighbouring output pixels of one row and one group. Sample s = pixel * taps +
// tap. The arrays are filled up to a multiple of kPad, so that the loops over them need no tail.
struct Block {
  static constexpr int kPad = 16;
  int pixels, samples;
  alignas(64) float x[kMaxSamples], y[kMaxSamples];  // offset_scale * (grid + offset); later the distances lx, ly
  alignas(64) int32_t column[kMaxSamples];           // the output pixel's place in x
  alignas(64) float mask[kMaxSamples];               // after softmax
  alignas(64) int32_t counts[kMaxSamples];           // -1 where -1 < x < W and -1 < y < H, 0 elsewhere
  // For the corners y0x0, y0x1, y1x0, y1x1: mask * bilinear weight, 0 where the sample does not count.
  alignas(64) float weight[4][kMaxSamples];
  alignas(64) uint32_t pixel[kMaxSamples];  // of the padded image, that corner y0x0 lies on
};
static_assert(kMaxSamples % Block::kPad == 0, "whole vectors");

struct Row {  // one output row of one group
  int64_t image, y;
  int group;
};

inline Row row_of(const dcngen_dcnv4_params& p, int64_t unit, int64_t y) {
  return {unit / p.groups, y, static_cast<int>(unit % p.groups)};
}

// Calls run(k) until the taps from k to k + L, vector after vector, have been all `taps`: the last vector ends with the
// last tap and so may begin among those of the one before. What fills no vector is left: returns the taps done.
template <int L, class Run>
inline int for_each_vector(int taps, Run run) {
  if (taps < L) return 0;
  for (int k = 0; k < taps - L; k += L) run(k);
  run(taps - L);
  return taps;
}

// The 3 * taps values of one (pixel, group) as floats: in place where they are floats already.
inline const float* as_floats(const float* from, float*, int) { return from; }
template <class T>
inline const float* as_floats(const T* from, float* buffer, int count) {
  convert(buffer, from, count);
  return buffer;
}

// Spreads the offsets and masks of a block over its arrays.
template <class T>
inline void read_samples(const Problem& q, const T* from, int64_t first_x, Block& b) {
  constexpr int L = DCNGEN_DOT_LANES;
  const int taps = q.taps;
  const float scale = q.p.offset_scale;
  float buffer[3 * kMaxSamples];
  int s = 0;
  for (int pixel = 0; pixel < b.pixels; ++pixel, from += q.p.offset_mask_pixel_stride) {
    prefetch<false>(from, q.p.offset_mask_pixel_stride, 3 * taps);
    const float* values = as_floats(from, buffer, 3 * taps);
    const float* masks = values + 2 * taps;
    const int32_t column = static_cast<int32_t>(q.origin_x + (first_x + pixel) * q.p.stride_w);
    int k = for_each_vector<L>(taps, [&](int k) {
      const Vec<L> low = load<L>(values + 2 * k), high = load<L>(values + 2 * k + L);
      store<L>(b.x + s + k, splat<L>(scale) * (load<L>(q.grid_x + k) + evens<L>(low, high)));
      store<L>(b.y + s + k, splat<L>(scale) * (load<L>(q.grid_y + k) + odds<L>(low, high)));
      store<L>(b.mask + s + k, load<L>(masks + k));
      put<L>(b.column + s + k, Flags<L>{} + column);
    });
    for (; k < taps; ++k) {
      b.x[s + k] = scale * (q.grid_x[k] + values[2 * k]);
      b.y[s + k] = scale * (q.grid_y[k] + values[2 * k + 1]);
      b.mask[s + k] = masks[k];
      b.column[s + k] = column;
    }
    s += taps;
  }
  for (; s % Block::kPad; ++s) b.x[s] = b.y[s] = b.mask[s] = 0.f, b.column[s] = 0;
}

// exp for x <= 0, about one unit in the last place; 0 below the smallest normal number, NaN for NaN.
// x = n ln 2 + r, a polynomial for exp(r) (Cephes, expf), 2^n through the exponent bits.
template <int L>
inline Vec<L> exp_nonpositive(Vec<L> x) {
  const Flags<L> tiny = x < splat<L>(-87.f);
  const Vec<L> clamped = x >= splat<L>(-87.f) ? x : splat<L>(-87.f);
  const Flags<L> n = __builtin_convertvector(clamped * 1.44269504f - 0.5f, Flags<L>);  // towards 0: to the nearest
  const Vec<L> whole = __builtin_convertvector(n, Vec<L>);
  const Vec<L> r = (clamped - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Vec<L> poly = splat<L>(1.9875691500e-4f);
  poly = poly * r + 1.3981999507e-3f;
  poly = poly * r + 8.3334519073e-3f;
  poly = poly * r + 4.1665795894e-2f;
  poly = poly * r + 1.6666665459e-1f;
  poly = poly * r + 5.0000001201e-1f;
  const Vec<L> value = (poly * r * r + r + 1.f) * bits_as<Vec<L>>((n + 127) << 23);
  const Vec<L> positive = tiny ? Vec<L>{} : value;
  return x == x ? positive : x;
}

// Masks of a block through softmax, pixel by pixel.
inline void softmax_masks(int taps, Block& b) {
  constexpr int L = DCNGEN_WIDE_LANES;
  for (int first = 0; first < b.samples; first += taps) {
    float top = b.mask[first];
    for (int k = 1; k < taps; ++k) top = b.mask[first + k] > top ? b.mask[first + k] : top;
    for (int k = 0; k < taps; ++k) b.mask[first + k] -= top;
  }
  for (int s = 0; s < b.samples; s += L) store<L>(b.mask + s, exp_nonpositive<L>(load<L>(b.mask + s)));
  for (int first = 0; first < b.samples; first += taps) {
    float sum = 0.f;
    for (int k = 0; k < taps; ++k) sum += b.mask[first + k];
    const float inverse = 1.f / sum;
    for (int k = 0; k < taps; ++k) b.mask[first + k] *= inverse;
  }
}

// A coordinate in two parts, the whole pixels and the distance from there, so that the distance is as exact at the far
// end of a wide map as at its start. inside: -1 < origin + shift < size.
template <int L>
struct Coordinate {
  Flags<L> whole, inside;
  Vec<L> distance;
};

template <int L>
inline Coordinate<L> coordinate(Flags<L> origin, Vec<L> shift, int32_t size) {
  const Vec<L> far = splat<L>(1e9f);  // farther than any image is wide, and still converts to an integer
  const Flags<L> near = (shift > -far) & (shift < far);  // false for NaN
  const Vec<L> bounded = near ? shift : Vec<L>{};
  Flags<L> whole = __builtin_convertvector(bounded, Flags<L>);
  whole += __builtin_convertvector(whole, Vec<L>) > bounded;  // rounded towards 0; now down
  const Vec<L> distance = bounded - __builtin_convertvector(whole, Vec<L>);
  whole += origin;
  const Flags<L> least = distance > Vec<L>{};  // -1 where a place between -1 and 0 is possible, else 0
  return {whole, near & (whole >= least) & (whole < size), distance};
}

// Corners and weights of every sample. Selects rather than products with 0: a NaN or far coordinate, or its mask,
// reaches no weight.
inline void locate(const Problem& q, int32_t line, Block& b) {
  constexpr int L = DCNGEN_WIDE_LANES;
  const int32_t width = static_cast<int32_t>(q.p.width_in), height = static_cast<int32_t>(q.p.height_in);
  // Indices of pixels fill 32 bits, so they are computed without a sign.
  using Indices = typename Lanes<L>::Word;
  const uint32_t padded_width = static_cast<uint32_t>(q.padded_width);
  const uint32_t nowhere = static_cast<uint32_t>(pixel_nowhere(q));
  for (int s = 0; s < b.samples; s += L) {
    Flags<L> column;
    __builtin_memcpy(&column, b.column + s, sizeof(column));
    const Coordinate<L> x = coordinate<L>(column, load<L>(b.x + s), width);
    const Coordinate<L> y = coordinate<L>(Flags<L>{} + line, load<L>(b.y + s), height);
    const Flags<L> counts = x.inside & y.inside;
    const Vec<L> lx = counts ? x.distance : Vec<L>{}, ly = counts ? y.distance : Vec<L>{};
    const Vec<L> mask = counts ? load<L>(b.mask + s) : Vec<L>{};
    const Indices column_in = bits_as<Indices>(x.whole + 1), row_in = bits_as<Indices>(y.whole + 1);
    const Indices corner = counts ? row_in * padded_width + column_in : Indices{} + nowhere;
    __builtin_memcpy(b.pixel + s, &corner, sizeof(corner));
    const Vec<L> lower = mask * ly, upper = mask - lower;
    store<L>(b.weight[0] + s, upper - upper * lx);
    store<L>(b.weight[1] + s, upper * lx);
    store<L>(b.weight[2] + s, lower - lower * lx);
    store<L>(b.weight[3] + s, lower * lx);
    store<L>(b.x + s, lx);
    store<L>(b.y + s, ly);
    put<L>(b.counts + s, counts);
  }
}

// Fills a block with the samples of output pixels [first_x, first_x + pixels) of a row.
template <class T>
inline void find_places(const Problem& q, const void* offset_mask, const Row& row, int64_t first_x, int pixels,
                        Block& b) {
  const auto& p = q.p;
  b.pixels = pixels;
  b.samples = pixels * q.taps;
  const int64_t pixel = (row.image * p.height_out + row.y) * p.width_out + first_x;
  const T* from = static_cast<const T*>(offset_mask) + pixel * p.offset_mask_pixel_stride +
                  int64_t{3} * q.taps * row.group;
  read_samples(q, from, first_x, b);
  if (p.softmax) softmax_masks(q.taps, b);
  locate(q, static_cast<int32_t>(q.origin_y + row.y * p.stride_h), b);
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
