"""One trainer and one config per stage, on TRL's base."""
