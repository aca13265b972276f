"""Skipped, with the reason, where the extra `curation` is not installed."""

import pytest

for module in ("datatrove", "rensa", "resiliparse", "py3langid", "phonenumbers", "scipy", "stdnum", "xxhash"):
    pytest.importorskip(module, reason=f"{module} is not installed: pip install '.[curation]'")
