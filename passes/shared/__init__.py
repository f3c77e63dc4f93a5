"""What several passes share; no pass is here."""
