// The table of tile sizes, and which problem gets which. Neither looks at the number of frames or clips, nor does the
// order of the sums: so chunks give the whole clip's bits.
#pragma once

#include <type_traits>

#include "geometry.h"

namespace vmae {

// A block's tile, how many of them are on their way at once, how many elements a copy takes, and how many blocks a
// multiprocessor's registers shall hold.
template <int ROWS, int COLUMNS, int DEPTH, int STAGES, int VECTOR, int BLOCKS, bool WARPGROUPS = false>
struct Tile {
  static constexpr int kRows = ROWS, kColumns = COLUMNS, kDepth = DEPTH, kStages = STAGES, kVector = VECTOR;
  static constexpr int kBlocks = BLOCKS;
  static constexpr bool kWarpgroups = WARPGROUPS;  // multiplied by wgmma, which compute capability 9.0 alone has
};

// For elements of BYTES: copies of 16 bytes where channels and addresses allow them, else one element at a time.
template <int BYTES, int BLOCKS>
struct Tiles {
  static constexpr int kVector = 16 / BYTES;
  static constexpr int kDepth = 64 / BYTES;
  using Wide = Tile<128, 128, kDepth, 4, kVector, BLOCKS>;
  using Narrow = Tile<128, 64, kDepth, 4, kVector, 2>;  // where the result has 64 channels or fewer
  using Scalar = Tile<64, 64, kDepth, 3, 1, 1>;
};

// For 16-bit elements on compute capability 9.0.
struct HopperTiles : Tiles<2, 2> {
  using Wide = Tile<128, 128, 64, 3, kVector, 2, true>;
  using Narrow = Tile<128, 64, 64, 4, kVector, 2, true>;
};

enum class Size { wide, narrow, scalar };

// For the convolution and the gradient of its input.
template <class Table>
Size convolution_tile(const Gather& g, bool addresses_allow) {
  if (g.channels % Table::kVector || !addresses_allow) return Size::scalar;
  return g.columns <= Table::Narrow::kColumns ? Size::narrow : Size::wide;
}

// For the gradient of the weight, whose rows are the output's channels and whose columns are (tap, channel).
template <class Table>
Size weight_gradient_tile(const Gather& g, bool addresses_allow) {
  return g.channels % Table::kVector || g.columns % Table::kVector || !addresses_allow ? Size::scalar : Size::wide;
}

// `run` with the tile of that size.
template <class Table, class Run>
void with_tile(Size size, Run&& run) {
  if (size == Size::wide) return run(static_cast<typename Table::Wide*>(nullptr));
  if (size == Size::narrow) return run(static_cast<typename Table::Narrow*>(nullptr));
  run(static_cast<typename Table::Scalar*>(nullptr));
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class Tile>
int64_t convolution_tiles(const Gather& g) {
  return ceil_div(g.rows(), Tile::kRows) * ceil_div(g.columns, Tile::kColumns);
}

template <class Tile>
int64_t weight_gradient_tiles(const Gather& g) {
  return ceil_div(g.columns, Tile::kRows) * ceil_div(static_cast<int64_t>(g.taps()) * g.channels, Tile::kColumns);
}

// The weight gradient's sum over positions is cut into slices, so that a small weight still fills a GPU. Each has its
// partial sums in the workspace, which are then added in order.
constexpr int kTilesWanted = 264;      // two for each multiprocessor of an H100
constexpr int64_t kLeastSlice = 2048;  // positions
constexpr int64_t kMostSlice = 1 << 30;  // so that they are counted in 32 bits

template <class Table>
int weight_gradient_slices(const Gather& g, Size size) {
  int64_t tiles = 0;
  with_tile<Table>(size, [&](auto* tile) { tiles = weight_gradient_tiles<std::remove_pointer_t<decltype(tile)>>(g); });
  int64_t least = ceil_div(g.rows(), kMostSlice), most = g.rows() / kLeastSlice;
  int64_t slices = kTilesWanted / tiles < most ? kTilesWanted / tiles : most;
  return static_cast<int>(slices > least ? slices : least > 1 ? least : 1);
}

// A whole number of tiles' depths.
VMAE_HD int64_t slice_length(int64_t positions, int slices, int depth) {
  int64_t length = (positions + slices - 1) / slices;
  return (length + depth - 1) / depth * depth;
}

}  // namespace vmae
