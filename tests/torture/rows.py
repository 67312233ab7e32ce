"""The rows: by name the attack, and how many cases the whole of it has."""

from tests.torture.kills import full, kills

ROWS = {
    "kills": (kills, 1000),
    "disk": (full, 200),
}
