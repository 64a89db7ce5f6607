"""Other libraries' functions on packseq's operators: models written for them run by changing an import."""
