"""Numbers that several rooms must agree on, each with its reason; kernels and PyTorch read them here."""

# Logarithms of features saturate here: exp(30) squared, times features, times a million tokens, stays inside float32.
MAX_LOG_FEATURE = 30.0
# The smallest sum of log decays whose inverse float32 bears as a factor; below, decays and inverses do not part.
FACTORABLE = -80.0
# About half of what FACTORABLE allows, in powers of two, which round nothing: moved from one factor to the other where
# decays come near it, it keeps both clear of underflow beside an operand.
HALF_EXPONENT = 57
# The smallest unit of mLSTM: below, exp(-unit), the floor of its denominator, would overflow, and it buys nothing.
SMALLEST_UNIT = -80.0
# The widest key whose state one program of a kernel holds.
WIDEST_KEY = 256
# Tokens of a chunk in PyTorch. A gate per channel costs an exponential per row, column and channel of a chunk, the
# others one per row and column.
CHUNK, CHUNK_PER_CHANNEL = 32, 16
# Queries that start from the same recalled tokens, beside kernels.
BLOCK = 64
# Tokens that are not worth a matrix product.
FEW_TOKENS = 4
