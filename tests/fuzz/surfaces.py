"""All surfaces by name."""

from tests.fuzz.caches import CACHES
from tests.fuzz.command_line import COMMAND_LINE
from tests.fuzz.files import FILES
from tests.fuzz.rules import RULES
from tests.fuzz.specs import SPECS
from tests.fuzz.trees import TREES

SURFACES = {
    "trees": TREES,
    "files": FILES,
    "caches": CACHES,
    "rules": RULES,
    "specs": SPECS,
    "command-line": COMMAND_LINE,
}
