"""Sites whose fault changes no result, by the reason why: `test_mutants` seeds nothing there.

Numbered by occurrence, so that a change of such a kernel may ask for other numbers.
"""

from tests.kernels.mutants import Site

_BY_REASON = {
    "what it lets in is never stored": [
        ("gradients", "gradients_kernel", "unfilled", 4),
        ("joint_gradients", "queries_kernel", "unfilled", 4),
        ("recurrent", "recurrent_kernel", "unfilled", 4),
        ("states", "joins_kernel", "unfilled", 0),
        ("states", "joins_kernel", "unfilled", 1),
    ],
    "what it lets in is times zeros: rows and columns outside were loaded as such": [
        ("joint_far_gradients", "far_keys_kernel", "nudge", 4),
        ("joint_gradients", "near_kernel", "first_condition", 2),
        ("joint_gradients", "queries_kernel", "nudge", 10),
        ("joint_gradients", "queries_kernel", "nudge", 11),
        ("joint_gradients", "queries_kernel", "second_condition", 0),
        ("joint_gradients", "sinks_kernel", "second_condition", 0),
        ("joint_outputs", "joint_kernel", "nudge", 6),
    ],
    "what it lets in is masked later": [
        ("joint_gradients", "near_kernel", "unfilled", 0),
        ("joint_gradients", "queries_kernel", "second_condition", 3),
        ("joint_states", "load_turned", "unfilled", 0),
    ],
    "it stores more, which nobody reads": [
        ("pairs", "products_kernel", "first_condition", 0),
    ],
    "more turns than it takes, in which every key is masked": [
        ("joint_outputs", "joint_kernel", "opposite", 15),
    ],
    "queries are launched for one head at a time": [
        ("joint_gradients", "queries_kernel", "opposite", 4),
    ],
}
EQUIVALENT = {Site(*site): reason for reason, sites in _BY_REASON.items() for site in sites}
