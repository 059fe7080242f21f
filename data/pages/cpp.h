#pragma once

#include <cstdint>
#include <vector>

namespace lab {

// Row of every assignment once assignments are sorted by expert.
inline std::vector<int64_t> positions(const std::vector<int32_t>& ids,
                                      int64_t num_experts) {
  std::vector<int64_t> next(num_experts + 1, 0);
  for (const auto id : ids) {
    ++next[id + 1];
  }
  for (int64_t e = 0; e < num_experts; ++e) {
    next[e + 1] += next[e];
  }
  std::vector<int64_t> out;
  out.reserve(ids.size());
  for (const auto id : ids) {
    out.push_back(next[id]++);
  }
  return out;
}

} // namespace lab
