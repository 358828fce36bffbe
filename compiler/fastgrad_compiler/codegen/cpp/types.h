using lane_integer = std::conditional_t<sizeof(real) == 8, std::int64_t, std::int32_t>;

constexpr int LANES = VECTOR_BYTES / sizeof(real);
typedef real vector __attribute__((vector_size(VECTOR_BYTES), may_alias));
typedef lane_integer lanes __attribute__((vector_size(VECTOR_BYTES), may_alias));

constexpr long round_up(long size, long unit) { return (size + unit - 1) / unit * unit; }

constexpr int CHUNK = round_up(TILE, std::max(LANES, TOKEN_ROWS));
constexpr int VALUES = round_up(DV, LANES), COLUMNS = round_up(D, LANES), NEAR_COLUMNS = round_up(NEAR_D, LANES);
constexpr long FEATURES = round_up(RANK, FEATURE_ROWS);
constexpr long NEAR_BLOCK = NEAR > 0 ? NEAR : 1;  // to divide by
constexpr real SCALE = LOGIT_SCALE;

// What follows from the specification.
constexpr long EVERY_TOKEN = 1L << 30;            // a window of all tokens
constexpr bool BANDED = WINDOW > 0;               // softmax within a window: there are no states
constexpr bool EXPONENTIAL = BANDED || NEAR > 0;  // pairs that are met one by one weigh exp(t), most of them
constexpr bool TOTAL = !(EXPONENTIAL || CAUSAL || DOCUMENTS);  // one state of all keys serves all queries
constexpr bool TWO_SIDED = !(BANDED || CAUSAL || TOTAL);       // far keys lie on both sides of a window
constexpr bool MIXED = NEAR > 0 && NEAR < TILE;                // a pair that is met one by one may be far
constexpr bool SEPARATE = NEAR_D > 0;                          // t comes from queries and keys of its own
constexpr bool SCORED = MIXED || !SEPARATE;                    // pairs that are met one by one need q.k
constexpr bool FUSED = CAUSAL && !EXPONENTIAL;  // pairs of a chunk meet its gradients in the sweep that writes them
constexpr bool STEPS = CAUSAL && !BANDED;      // the next tokens of a sequence are served from what is kept of it
