"""What a run would need on TPUs that are not there: real compilations for a named topology, read and priced."""
