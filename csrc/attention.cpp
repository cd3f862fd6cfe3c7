// regional_attention on the host: the queries of each set of prompts together, a tile of them at a time.
#include <algorithm>
#include <cmath>
#include <map>

#include "host.h"
#include "softmax.h"

namespace instantas {

namespace {

constexpr int64_t TASK = 16 * TILE_ROWS;  // queries whose head a thread takes at once
constexpr int64_t GRAIN = 1 << 18;        // products that are worth a thread

// The queries of an image that have the same prompts.
struct Group {
  int64_t image;
  std::vector<int64_t> queries;
  std::vector<int64_t> prompts, shares;  // rows of the bank, and where the shares of an image's queries begin
};

// Which prompts a query has, and how much of each: its weight relative to the sum of the query's, jointly the logarithm
// of it relative to the largest. A prompt that is named twice counts with the sum of its weights.
template <class A>
struct Regions {
  std::vector<A> shares;
  std::vector<Group> groups;

  Regions(const Tensor& ids, const Tensor& weights, int64_t prompts, bool joint) : shares(weights.numel()) {
    const int64_t images = weights.size(0), slots = weights.size(1), queries = weights.size(2);
    for (int64_t image = 0; image < images; ++image) {
      const int64_t begin = image * slots * queries;
      std::map<int64_t, int64_t> start;  // prompt -> where its shares begin
      for (int64_t slot = 0; slot < slots; ++slot) {
        const int64_t prompt = data<int32_t>(ids)[image * slots + slot];
        if (prompt < 0 || prompt >= prompts) continue;
        const int64_t next = begin + static_cast<int64_t>(start.size()) * queries;
        A* share = shares.data() + start.try_emplace(prompt, next).first->second;
        const A* weight = data<A>(weights) + begin + slot * queries;
        for (int64_t n = 0; n < queries; ++n) share[n] += weight[n];
      }
      std::vector<A> whole(queries);
      for (const auto& [prompt, first] : start)
        for (int64_t n = 0; n < queries; ++n)
          whole[n] = joint ? std::max(whole[n], shares[first + n]) : whole[n] + shares[first + n];
      std::vector<int64_t> set(queries);  // of the prompts so far, numbered as they come
      int64_t sets = 1;
      for (const auto& [prompt, first] : start) {
        std::vector<int64_t> number(2 * sets, -1);
        sets = 0;
        for (int64_t n = 0; n < queries; ++n) {
          A& share = shares[first + n];
          share /= whole[n];
          int64_t& own = number[2 * set[n] + (share > 0)];
          if (own < 0) own = sets++;
          set[n] = own;
        }
      }
      group(image, set, sets, start, joint);
    }
  }

 private:
  void group(int64_t image, const std::vector<int64_t>& set, int64_t sets, const std::map<int64_t, int64_t>& start,
             bool joint) {
    const size_t first_group = groups.size();
    groups.resize(first_group + sets, Group{image});
    for (size_t n = 0; n < set.size(); ++n) groups[first_group + set[n]].queries.push_back(n);
    for (size_t i = first_group; i < groups.size(); ++i)
      for (const auto& [prompt, first] : start) {
        if (groups[i].queries.empty() || !(shares[first + groups[i].queries[0]] > 0)) continue;
        groups[i].prompts.push_back(prompt);
        groups[i].shares.push_back(first);
        for (const int64_t n : groups[i].queries)
          if (joint) shares[first + n] = std::log(shares[first + n]);
      }
  }
};

// to (depth, tokens) = the transposed `from` (tokens, depth), by squares that stay in the nearest cache.
template <class T, class A>
void turn(const T* from, int64_t pitch_from, int64_t tokens, int64_t depth, A* to, int64_t pitch_to) {
  constexpr int64_t SIDE = 16;
  for (int64_t first = 0; first < tokens; first += SIDE)
    for (int64_t d = 0; d < depth; ++d)
      for (int64_t t = first; t < std::min(tokens, first + SIDE); ++t)
        to[d * pitch_to + t] = widen(from[t * pitch_from + d]);
}

// The keys and values of the prompts that some query has, head by head, as tiles read them.
template <class A>
class Bank {
 public:
  template <class T>
  Bank(const Tensor& key, const Tensor& value, const OptionalTensor& lengths, const std::vector<Group>& groups,
       int64_t lanes, T)
      : heads_(key.size(2)) {
    for (const Group& group : groups)
      for (const int64_t prompt : group.prompts) first_.try_emplace(prompt, 0);
    std::vector<int64_t> used;
    for (auto& [prompt, first] : first_) {
      first = heads_ * static_cast<int64_t>(used.size());
      used.push_back(prompt);
    }
    const int64_t limit = key.size(1), depth = key.size(3), width = padded(depth, lanes);
    const int64_t of_keys = depth * padded(limit, lanes), of_values = limit * width;
    keys_.resize(used.size() * heads_ * of_keys);
    values_.resize(used.size() * heads_ * of_values);
    heads_of_prompts_.resize(used.size() * heads_);
    const T *from_key = data<T>(key), *from_value = data<T>(value);
    const int64_t grain = GRAIN / (limit * depth) + 1;
    torch::stable::parallel_for(0, heads_of_prompts_.size(), grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t prompt = used[i / heads_], head = i % heads_;
        const int64_t tokens = lengths ? std::clamp<int64_t>(data<int32_t>(*lengths)[prompt], 1, limit) : limit;
        A *keys = keys_.data() + i * of_keys, *values = values_.data() + i * of_values;
        const int64_t first = (prompt * limit * heads_ + head) * depth, pitch = heads_ * depth;
        turn(from_key + first, pitch, tokens, depth, keys, padded(tokens, lanes));
        for (int64_t t = 0; t < tokens; ++t)
          for (int64_t d = 0; d < depth; ++d) values[t * width + d] = widen(from_value[first + t * pitch + d]);
        heads_of_prompts_[i] = {keys, values, tokens};
      }
    });
  }

  const Prompt<A>& prompt(int64_t number, int64_t head) const { return heads_of_prompts_[first_.at(number) + head]; }

 private:
  int64_t heads_;
  std::map<int64_t, int64_t> first_;  // prompt -> its first head
  std::vector<A> keys_, values_;
  std::vector<Prompt<A>> heads_of_prompts_;
};

// One head of some queries of a group.
template <class T, class A>
void attend_group(const T* query, T* out, const Regions<A>& regions, const Group& group, const Bank<A>& bank,
                  int64_t begin, int64_t end, int64_t head, const int64_t* shape, bool joint, A scale) {
  static const Attend<A> kernel = attend<A>();
  const int64_t queries = shape[1], heads = shape[2], depth = shape[3], width = padded(depth, kernel.lanes);
  std::vector<Prompt<A>> prompts;
  int64_t longest = 0, all = 0;
  for (const int64_t prompt : group.prompts) {
    prompts.push_back(bank.prompt(prompt, head));
    const int64_t tokens = padded(prompts.back().tokens, kernel.lanes);
    longest = std::max(longest, tokens);
    all += tokens;
  }
  const int64_t count = prompts.size(), pitch = joint ? all : longest;
  std::vector<A> some(TILE_ROWS * depth), results(TILE_ROWS * width), logits(TILE_ROWS * pitch);
  std::vector<A> shares(count * TILE_ROWS), zeros(TILE_ROWS), ones(TILE_ROWS, A(1));
  const Tile<A> tile{depth, scale, some.data(), results.data(), logits.data(), pitch};
  for (; begin < end; begin += TILE_ROWS) {
    const int64_t rows = std::min<int64_t>(TILE_ROWS, end - begin);
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t n = group.queries[begin + m];
      const T* row = query + ((group.image * queries + n) * heads + head) * depth;
      for (int64_t d = 0; d < depth; ++d) some[m * depth + d] = widen(row[d]);
      for (int64_t i = 0; i < count; ++i) shares[i * TILE_ROWS + m] = regions.shares[group.shares[i] + n];
    }
    std::fill(results.begin(), results.end(), A(0));
    if (joint)
      kernel.run(tile, prompts.data(), count, shares.data(), ones.data(), true);
    else
      for (int64_t i = 0; i < count; ++i)
        kernel.run(tile, &prompts[i], 1, zeros.data(), &shares[i * TILE_ROWS], false);
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t row = (group.image * queries + group.queries[begin + m]) * heads + head;
      for (int64_t d = 0; d < depth; ++d) out[row * depth + d] = narrow<T>(results[m * width + d]);
    }
  }
}

template <class T, class A = arithmetic_t<T>>
void attention(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& ids, const Tensor& weights,
               bool joint, A scale, const OptionalTensor& lengths, const Tensor& out) {
  const Regions<A> regions(ids, weights, key.size(0), joint);
  const Bank<A> bank(key, value, lengths, regions.groups, attend<A>().lanes, T{});
  struct Task {
    const Group* group;
    int64_t begin;
  };
  std::vector<Task> tasks;
  for (const Group& group : regions.groups)
    for (int64_t begin = 0; begin < static_cast<int64_t>(group.queries.size()); begin += TASK)
      tasks.push_back({&group, begin});
  const int64_t heads = query.size(2), grain = GRAIN / (TASK * key.size(1) * query.size(3)) + 1;
  torch::stable::parallel_for(0, tasks.size() * heads, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Task& task = tasks[i / heads];
      const int64_t last = std::min<int64_t>(task.begin + TASK, task.group->queries.size());
      attend_group(data<T>(query), mutable_data<T>(out), regions, *task.group, bank, task.begin, last, i % heads,
                   query.sizes().data(), joint, scale);
    }
  });
}

Tensor int32(const Tensor& tensor) {
  return packed(tensor.scalar_type() == ScalarType::Int ? tensor : torch::stable::to(tensor, ScalarType::Int));
}

}  // namespace

Tensor regional_attention(Tensor query, Tensor key, Tensor value, Tensor prompt_ids, Tensor weights, bool joint,
                          double scale, OptionalTensor order, OptionalTensor lengths) {
  query = packed(query), key = packed(key), value = packed(value), prompt_ids = int32(prompt_ids);
  weights = *packed_arithmetic(weights, query);
  if (lengths) lengths = int32(*lengths);
  Tensor out = uninitialized(query, query.sizes());
  if (query.numel() == 0) return out;
  with_element(query, [&](auto element) {
    using T = decltype(element);
    attention<T>(query, key, value, prompt_ids, weights, joint, static_cast<arithmetic_t<T>>(scale), lengths, out);
  });
  return out;
}

}  // namespace instantas
