// What window_attention computes on: which tokens of the map meet, as index arithmetic.
//
// Each axis of the map is cut into cells; tokens attend to each other when their row lies in one
// row cell and their column in one column cell. A cell is an arithmetic progression of positions:
//
//   window, no shift   [0,w) [w,2w) ...                        step 1
//   window, shift s    [0,s) [s,s+w) [s+w,s+2w) ...            step 1
//   grid (patch p)     {r, r+p, r+2p, ...} for r in 0..p-1     step p
//
// The shifted form needs neither roll nor mask: what Swin masks are the tokens that meet only
// through the roll, and without them a rolled window falls apart into cells of the shifted ruler.
// Positions past the end of the map do not exist, which is what a padding that nobody can see
// means. Only pooling still sees rolled windows: `pool` is the window whose mean a cell's tokens
// enter.
#pragma once

#include <cstdint>

#if defined(__CUDACC__) || defined(KERNELPOSE_EMULATOR)
#define KP_HOST_DEVICE __host__ __device__
#else
#define KP_HOST_DEVICE
#endif

namespace kernelpose {

struct Cell {
  int first;  // position of its first token on the axis
  int step;   // distance between neighbours
  int count;  // tokens, at least 1
};

struct Axis {
  int size;    // tokens of the map on this axis, >= 1
  int window;  // window edge, or patch edge for the grid partition, >= 1
  int shift;   // 0 <= shift < window; 0 for the grid partition
  bool grid;

  KP_HOST_DEVICE int cells() const {
    if (grid) return window < size ? window : size;
    if (shift == 0) return (size + window - 1) / window;
    return size <= shift ? 1 : 1 + (size - shift + window - 1) / window;
  }

  KP_HOST_DEVICE Cell cell(int index) const {
    if (grid) return {index, window, (size - index + window - 1) / window};
    const int first = shift == 0 ? index * window : (index == 0 ? 0 : shift + (index - 1) * window);
    const int end = (shift != 0 && index == 0) ? shift : first + window;
    return {first, 1, (end < size ? end : size) - first};
  }

  // Windows of the rolled, padded map; their means are what `pooled` adds to every cell's keys.
  KP_HOST_DEVICE int pools() const { return grid ? cells() : (size + window - 1) / window; }

  KP_HOST_DEVICE int pool(int cell_index) const {
    if (grid || shift == 0) return cell_index;
    return cell_index == 0 ? pools() - 1 : cell_index - 1;
  }

  // Tokens of the map in a window, padding left out.
  KP_HOST_DEVICE int pool_tokens(int index) const {
    if (grid) return cell(index).count;
    if (shift == 0) return window < size - index * window ? window : size - index * window;
    const int last = index == pools() - 1 ? cell(0).count : 0;
    return last + (index + 1 < cells() ? cell(index + 1).count : 0);
  }

  // Largest cell there can be; the relative-position table has 2 * extent - 1 entries on this axis.
  KP_HOST_DEVICE int extent() const { return grid ? (size + window - 1) / window : window; }
};

struct WindowAttentionShape {
  int64_t batch;
  Axis rows, columns;
  int heads;
  int head_dim;  // 1..128
  bool pooled;
  double scale;  // kernels that compute in float convert it once, on the host

  KP_HOST_DEVICE int channels() const { return heads * head_dim; }
  KP_HOST_DEVICE int64_t tokens() const { return int64_t{1} * rows.size * columns.size; }
  KP_HOST_DEVICE int cells() const { return rows.cells() * columns.cells(); }
  KP_HOST_DEVICE int pools() const { return pooled ? rows.pools() * columns.pools() : 0; }
  KP_HOST_DEVICE int pool_tokens(int index) const {
    return rows.pool_tokens(index / columns.pools()) * columns.pool_tokens(index % columns.pools());
  }
  KP_HOST_DEVICE int bias_rows() const { return 2 * rows.extent() - 1; }
  KP_HOST_DEVICE int bias_columns() const { return 2 * columns.extent() - 1; }

  // Row of the (bias_rows * bias_columns, heads) table for a query and a key given by their
  // positions inside their cell. Cells keep the orientation of the map, so differences suffice.
  KP_HOST_DEVICE int bias_row(int query_y, int query_x, int key_y, int key_x) const {
    return (query_y - key_y + rows.extent() - 1) * bias_columns() + query_x - key_x +
           columns.extent() - 1;
  }
};

}  // namespace kernelpose
