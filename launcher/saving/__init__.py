"""One owner of a save: when, room, best, retention, hand-over to the Hub."""
