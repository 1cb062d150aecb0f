"""The words of self-reflection whose counts Table 4 compares."""

WORDS = ("Wait", "Hmm", "Mistake", "Alternatively", "Check")
