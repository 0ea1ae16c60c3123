"""EleutherAI's lm-eval, made quiet while it runs. Seen in lm-eval 0.4.9 to 0.4.13."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

__all__ = ["quiet_lm_eval"]


@contextlib.contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Silence lm-eval's logger, and the git process that it starts, inside the block.

    - Changed and put back: ``lm_eval.evaluator.get_git_commit_hash`` and the level of the logger ``lm_eval``,
      seen in lm-eval 0.4.9 to 0.4.13.
    - Without it: lm-eval warns of being given a model, and git complains outside a repository, about a hash
      that nothing here uses.
    - Can go: when ``simple_evaluate`` can be told not to ask git.
    """
    from lm_eval import evaluator

    logger = logging.getLogger("lm_eval")
    level, ask_git = logger.level, evaluator.get_git_commit_hash
    logger.setLevel(logging.ERROR)
    evaluator.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = ask_git
        logger.setLevel(level)
