"""Sites whose fault changes no result, by the reason why: `test_mutants` seeds nothing there.

Numbered by occurrence, so that a change of such a kernel may ask for other numbers.
"""

from tests.kernels.mutants import Site

_BY_REASON = {
    "what it lets in is never stored": [
        ("gradients", "gradients_kernel", "unfilled", 4),
        ("recurrent", "recurrent_kernel", "unfilled", 4),
        ("states", "joins_kernel", "unfilled", 1),
    ],
    "what it lets in is times zeros: rows and columns outside were loaded as such": [
        ("joint_gradients", "near_kernel", "first_condition", 2),
        ("joint_gradients", "queries_kernel", "second_condition", 0),
        ("joint_gradients", "sinks_kernel", "second_condition", 0),
    ],
    "it stores more, which nobody reads": [
        ("pairs", "products_kernel", "first_condition", 0),
    ],
}
EQUIVALENT = {Site(*site): reason for reason, sites in _BY_REASON.items() for site in sites}
