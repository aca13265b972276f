"""Raw text to training documents, as datatrove steps."""

import os

os.environ.setdefault("LOGURU_LEVEL", "ERROR")  # datatrove's logger otherwise greets on every import
