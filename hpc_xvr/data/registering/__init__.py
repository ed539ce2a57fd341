"""Find out where and when one camera saw what the other did."""
