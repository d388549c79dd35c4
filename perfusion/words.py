"""Which names, placeholders and superclasses are accepted, from a user or from a file."""

from __future__ import annotations

import re
import unicodedata

TEXT_LIMIT = 128
# Separators of paths and of prompt syntax, so that a placeholder is always one whole word.
FORBIDDEN_IN_WORDS = "/\\:(){}[],;|\"'*?`"
_IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}", re.ASCII)



