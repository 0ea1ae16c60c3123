"""The eight commonsense tasks, by the published protocol and by likelihood."""
