"""Changing graphs: the rewriter, rules with patterns, contracts, and the ledger of decisions."""

from .ledger import Entry, record
from .rewriter import Visit, rewrite, rewrite_each
from .rules import ApplyRules, Match, Rule

__all__ = ["ApplyRules", "Entry", "Match", "Rule", "Visit", "record", "rewrite", "rewrite_each"]
