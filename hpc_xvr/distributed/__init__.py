"""Who am I among the ranks, and how do ranks talk: the only room that knows MPI."""
