"""The rows: by name the attack, and how many cases the whole of it has."""

from tests.torture import fuzz, tables
from tests.torture.hostile import DAMAGES, hostile
from tests.torture.kills import full, kills
from tests.torture.races import races

ROWS = {
    "kills": (kills, 1000),
    "disk": (full, 200),
    "races": (races, 50),
    "headers": (fuzz.headers, 5000),
    "configs": (fuzz.configs, 5000),
    "settings": (fuzz.settings, 500),
    "gguf": (fuzz.ggufs, 1000),
    "checkpoints": (fuzz.checkpoints, 300),
    "run.json": (fuzz.runs, 200),
    "hostile": (hostile, len(DAMAGES)),
    "caches": (tables.caches, len(tables.MISUSES)),
    "threads": (tables.threads, 8 * 600),
    "doors": (tables.doors, tables.DOORS),
}
