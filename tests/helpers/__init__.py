"""What several test modules share: models, cases, targets that are played."""
