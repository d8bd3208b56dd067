"""Let the site's generated parts show docstrings' roles (``:class:`~squall.placement.Layout```) as code."""

from __future__ import annotations

import re
from typing import Any

import griffe

_LEAD = re.compile(r"^(Metrics|What fails)\b", re.M)
_ROLE = re.compile(r":\w+:`~?(?:[\w.]+\.)?(\w+)`")


class Roles(griffe.Extension):
    """Replaces ``:func:`~squall.sparsity.save_compressed``` by ``save_compressed``, and lets Metrics stand out."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one object's docstring.

        Args:
            obj: A module, class, function or attribute.

        """
        if obj.docstring is not None:
            obj.docstring.value = _LEAD.sub(r"**\1**", _ROLE.sub(r"`\1`", obj.docstring.value))
