"""Self-checks of a loaded model; each raises ModelError if the model would give wrong text."""

from paceline.models.self_checks.packed_forward import check_packed_forward
from paceline.models.self_checks.skipped_sublayers import check_sublayers

__all__ = ["check_packed_forward", "check_sublayers"]
