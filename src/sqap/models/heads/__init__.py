"""Action heads: from the decoder's last hidden state to a normalised action chunk."""
