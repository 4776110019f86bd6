"""Files of strangers, spoilt at random: each is read, or refused by one message, within limits."""
