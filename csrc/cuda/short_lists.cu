// Short lists: everything about a query in one launch, in shared memory.
//
// A team of threads owns a query: a warp where lists are short and many (four queries to a block), else a block. It computes
// the ensemble s of docs/algorithm.md, section 2, and the loss of section 3 with its gradient.
//
//   stage       every input once from device memory, teachers by 16-byte loads; 52 + 4 M bytes of shared memory per document
//   measure     mean and deviation per teacher: a group of lanes each, in double
//   sort        by label, bitonic, in shared memory: log²n / 2 exchanges per document
//   iterate     T times: λ by a group of lanes per document (pairs.h), new exponent, tilted mean, one barrier
//   pull        λ once more, and its product with every teacher: the query's pull on weights that all queries share
//   loss        pairs of the student's loss, the gradient straight to device memory
//
// Floor per query (n documents, M teachers, T iterations, float32): 4 n (M + 3) bytes in and out of device memory.
// Instructions, by arithmetic: ensemble T n² (3 float + 1/4 reciprocal) less the pairs of equal labels, T n M (1 exponential +
// 5); distillation n² (12 float + 1/2 reciprocal); label losses as their files say. Weights are 4 n bytes more in, and pairs with
// weights take loops of their own. From about 64 documents on the pairs limit it (float and reciprocal pipes
// about evenly); below, the latency of T dependent iterations, each a tilted mean, a barrier and n / (4 lanes) dependent
// additions. At weights that are given T is 0: nothing is sorted for the ensemble, one tilted mean remains; the pulls add the
// sort, one sweep over the pairs, n² (3 float + 1/4 reciprocal), and 2 n M float, and 4 M bytes out.
#include "launch.h"
#include "loss.h"

namespace pile::gpu {
namespace {

constexpr int kMostThreads = 512, kThreadsOfWarps = 128, kSpillThreads = 256, kReduceThreads = 256;
constexpr int kLongest = 1024;  // documents

// Documents of no query, behind the last: whoever has the last query writes them.
template <class Team>
PILE_DEVICE void finish_tail(const Call& call, const Query& query, const Team& team) {
  if (!call.batch.cu_seqlens.data || query.index + 1 < call.batch.queries) return;
  const int teachers = call.teachers();
  for (int64_t d = query.output + query.n + team.rank; d < call.documents(); d += team.size) {
    if (call.out.logits) static_cast<float*>(call.out.logits)[d] = not_a_number();
    if (call.out.gradient) store_gradient(call, d, 0);
    for (int m = 0; call.out.weights && call.by_document() && m < teachers; ++m)
      static_cast<float*>(call.out.weights)[d * teachers + m] = 0;
  }
}

template <class Team>
PILE_DEVICE void run_query(const Call& call, const Query& query, const Workspace& w) {
  const Team team(w.partial);
  finish_tail(call, query, team);
  stage(call, query, team, w);
  Counts counts;
  if (call.has_ensemble) counts = EnsembleQuery<Team>(call, query, team, w).run();
  if (call.has_loss) LossQuery<Team>(call, query, team, w).run(counts);
}

__global__ void __launch_bounds__(kThreadsOfWarps, 4) warp_per_query(const Call call) {
  PILE_SHARED_MEMORY(memory);
  const int warp = int(threadIdx.x) / 32;
  const int64_t q = int64_t(blockIdx.x) * (blockDim.x / 32) + warp;
  if (q >= call.batch.queries) return;
  const Query query = locate(call, q);
  if (query.n >= call.capacity) return;  // block_per_long_query takes it
  float* const own = reinterpret_cast<float*>(memory) + warp * Workspace::words(call.capacity, call.teachers());
  run_query<WarpTeam>(call, query, Workspace(own, call.capacity, call.teachers()));
}

__global__ void __launch_bounds__(kMostThreads, 1) block_per_query(const Call call) {
  PILE_SHARED_MEMORY(memory);
  const Query query = locate(call, blockIdx.x);
  if (query.n >= call.capacity) return;
  run_query<BlockTeam>(call, query, Workspace(reinterpret_cast<float*>(memory), call.capacity, call.teachers()));
}

// The scratch buffer's words that a query of n documents may use, and where they begin: past those of the queries before it.
constexpr int64_t kAlign = 4;  // words: 16 bytes
PILE_SHARED int64_t spill_words(int64_t documents_before, int64_t queries_before, int teachers) {
  const int64_t documents = (documents_before + kAlign - 1) / kAlign * kAlign + 2 * kAlign * queries_before;
  return documents * (Workspace::kFields + teachers) + queries_before * Workspace::words(0, teachers);
}
// n + 1 at least: running sums have one more.
PILE_SHARED int capacity_for(int64_t n) { return int((n / kAlign + 1) * kAlign); }

// The lists of a packed batch that shared memory does not hold, in the scratch buffer: right, but slow.
__global__ void __launch_bounds__(kSpillThreads, 1) block_per_long_query(const Call call) {
  const Query query = locate(call, blockIdx.x);
  if (query.n < call.capacity) return;
  float* const base = static_cast<float*>(call.scratch) + spill_words(query.output, query.index, call.teachers());
  run_query<BlockTeam>(call, query, Workspace(base, capacity_for(query.n), call.teachers()));
}

// Loss over the queries, and for the mean the gradient divided by how many have pairs. Blocks share out the gradient; each
// counts the queries for itself, the first sums the losses.
__global__ void __launch_bounds__(kReduceThreads, 2) reduce_queries(const Call call) {
  PILE_SHARED_MEMORY(memory);
  const BlockTeam team(memory);
  const bool mean = call.loss.reduction == Reduction::mean;
  double total = 0, count = 0;
  for (int64_t q = team.rank; q < call.batch.queries; q += team.size) {
    count += call.has_pairs[q];
    if (blockIdx.x == 0) total += call.losses[q];
  }
  const double divisor = mean ? larger(team.sum(count), 1.0) : 1.0;
  if (blockIdx.x == 0) {
    total = team.sum(total);
    if (team.rank == 0) *static_cast<float*>(call.out.loss) = float(total / divisor);
  }
  if (!call.scaled) return;
  const float scale = float(1 / divisor);
  const float* gradient = static_cast<const float*>(call.out.gradient);
  Call to = call;
  to.out.gradient = call.scaled;
  to.scaled = nullptr;
  for (int64_t d = int64_t(blockIdx.x) * team.size + team.rank; d < call.documents(); d += int64_t(gridDim.x) * team.size)
    store_gradient(to, d, gradient[d] * scale);
}

}  // namespace

bool has_term(const std::string& key) {
  bool found = false;
  const auto look = [&](auto term) { found = found || (key == term.kKey && Loss<decltype(term)>::kHere); };
  Distillation::each(look);
  LabelLoss::each(look);
  return found;
}

void set_options(Call& call, const EnsembleOptions* ensemble, const LossOptions* loss) {
  if (ensemble) {
    call.has_ensemble = true;
    call.ensemble = *ensemble;
    call.step = float(ensemble->step_size);
    call.per_unit = float(1 / ensemble->temperature);
    call.offset = float(ensemble->margin / ensemble->temperature);
  }
  if (loss) {
    call.has_loss = true;
    call.loss = *loss;
    if (call.distills()) with_loss(loss->distillation, [&](auto of, auto term) { call.distill_unit = of.unit(term); });
    if (call.ranks())
      with_loss(loss->label_loss, [&](auto of, auto term) { call.label_gain = of.gain(term, loss->pair_weight); });
  }
}

// Microseconds of an ensemble's sweeps and the loss on a GPU of an H100's speed, by arithmetic (docs/cuda.md): here a wave of
// blocks, 18 float instructions per pair and 3 for every sweep; there launches of 2.5 µs, waves of eight blocks, 200
// instructions per document and 100 for every sweep.
bool linear_time_is_faster(double queries, double n, double sweeps, double processors) {
  const double per_microsecond = 128 * 1700;  // float instructions of a multiprocessor
  const double direct = larger(queries / processors, 1.0) * n * n * (18 + 3 * sweeps) / per_microsecond;
  const double launches = 20 + 2 * sweeps, pieces = queries * larger(n / 1024, 1.0);
  return direct > launches * (2.5 + larger(pieces / (8 * processors), 1.0)) +
                      queries * n * (200 + 100 * sweeps) / (processors * per_microsecond);
}

ShortPlan plan_short(int64_t queries, int64_t slots, bool packed, int teachers, int64_t sweeps, bool direct,
                     const Device& device) {
  ShortPlan plan;
  // A workspace of more than 2^31 words, which only a list of a huge packed batch might want, is for run_long.
  if (packed && Workspace::words(slots + 2 * kAlign, teachers) > 0x7fffffff) return plan;
  const int64_t mean = packed ? (slots + larger<int64_t>(queries, 1) - 1) / larger<int64_t>(queries, 1) : slots;
  if (mean > kLongest || (!direct && linear_time_is_faster(double(queries), double(mean), double(sweeps), device.processors)))
    return plan;
  // A packed batch's longest list is not known here: room for four times the mean, and the scratch buffer for what is longer.
  const int64_t longest = packed ? smaller(slots, larger<int64_t>(4 * mean, 128)) : slots;
  const int64_t block_words = device.shared_bytes / 4;
  int64_t capacity = capacity_for(longest);
  if (Workspace::words(capacity, teachers) > block_words) {
    if (!packed) return plan;
    capacity = (block_words - Workspace::words(0, teachers)) / (Workspace::kFields + teachers) / kAlign * kAlign;
    if (capacity <= mean) return plan;
  }
  plan.capacity = int(capacity);
  plan.spills = packed && slots >= capacity;
  plan.scratch_bytes = plan.spills ? 4 * spill_words(slots, queries, teachers) : 0;
  const int n = int(larger<int64_t>(packed ? mean : slots, 1));
  const int64_t words = Workspace::words(capacity, teachers);
  // Warps need no block barriers, but four of them must fit, and there must be work for all of them.
  plan.warps = n <= 32 || (n <= 64 && queries >= 16 * device.processors);
  plan.warps = plan.warps && kThreadsOfWarps / 32 * words <= smaller<int64_t>(block_words, 12 * 1024);
  if (plan.warps) {
    plan.threads = kThreadsOfWarps;
    plan.rows = 4;
    plan.shared_bytes = 4 * words * (kThreadsOfWarps / 32);
    return plan;
  }
  // Four rows to four lanes are the cheaper arithmetic; one row the shorter wait, where the device is not full.
  const bool full = queries * n * kLanes > int64_t(device.processors) * 1024;
  plan.rows = full || n > 256 ? 4 : 1;
  plan.threads = smaller((n * kLanes / plan.rows + 31) / 32 * 32, kMostThreads);
  plan.shared_bytes = 4 * words;
  return plan;
}

void run_short(Call call, const ShortPlan& plan, cudaStream_t stream) {
  const int64_t queries = call.batch.queries;
  call.capacity = plan.capacity;
  call.rows = plan.rows;
  if (queries > 0x7fffffff) throw std::runtime_error("expected at most 2^31 - 1 queries, got " + std::to_string(queries));
  const auto kernel = plan.warps ? warp_per_query : block_per_query;
  const int per_block = plan.warps ? plan.threads / 32 : 1;
  if (plan.shared_bytes > 48 * 1024)  // beyond, a kernel has to be told
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(plan.shared_bytes)),
          "cudaFuncSetAttribute");
  launch(kernel, (queries + per_block - 1) / per_block, plan.threads, size_t(plan.shared_bytes), stream, call);
  check(cudaGetLastError(), "the launch for short lists");
  if (!plan.spills) return;
  launch(block_per_long_query, queries, kSpillThreads, 0, stream, call);
  check(cudaGetLastError(), "the launch for lists beyond shared memory");
}

void reduce(const Call& call, const Device& device, cudaStream_t stream) {
  const int64_t share = 4 * kReduceThreads, most = 4 * device.processors;
  const int64_t blocks = call.scaled ? larger<int64_t>(smaller((call.documents() + share - 1) / share, most), 1) : 1;
  launch(reduce_queries, blocks, kReduceThreads, BlockTeam::kBytes, stream, call);
  check(cudaGetLastError(), "the launch of the reduction");
}

}  // namespace pile::gpu
