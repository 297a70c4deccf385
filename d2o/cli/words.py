"""The words that the shell completes. Where they come from takes seconds to import, so they are kept in
`d2o/assets/words.json`.

`python -m d2o.cli.words` writes that file again, and the recipes' JSON schema, after a teacher, method, key, protocol,
extractor, metric or reference was added or described otherwise.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

from d2o.inputs import JsonObject

FILE = Path(str(resources.files("d2o") / "assets" / "words.json"))


def collect() -> JsonObject:
    """The words as d2o knows them now. `keys`: of recipes, "" those of all, else by method."""
    from d2o.evaluation.known_metrics import METRICS
    from d2o.evaluation.named_extractors import EXTRACTORS
    from d2o.evaluation.named_references import REFERENCES
    from d2o.evaluation.paper_protocols import PRESETS
    from d2o.methods.base import method_names
    from d2o.recipes.schema import LOADER_KEYS, describe
    from d2o.teachers.registry import teacher_names

    plain = [row.key for row in describe() if row.key not in LOADER_KEYS]
    keys = {
        name: [row.key for row in describe(name) if row.key not in (*plain, *LOADER_KEYS)] for name in method_names()
    }
    return {
        "teachers": teacher_names(),
        "keys": {"": plain, **keys},
        "protocols": sorted(PRESETS),
        "extractors": sorted(EXTRACTORS),
        "metrics": sorted(METRICS),
        "references": sorted([*REFERENCES, "real:digits"]),
    }


def load() -> JsonObject:
    return json.loads(FILE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    from d2o.recipes.editor import schema_text
    from d2o.shipped import recipe_folders

    FILE.write_text(json.dumps(collect(), indent=1) + "\n", encoding="utf-8")
    (recipe_folders()[0] / "schema.json").write_text(schema_text(), encoding="utf-8")
