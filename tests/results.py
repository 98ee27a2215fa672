"""Parts of a result.json, for tests of what is made of them."""

PROTOCOL = {
    "use_query_time": False,
    "max_history_len": 50,
    "num_candidates": 12101,
    "num_users": 22363,
    "test_history_includes_valid": True,
    "selection_metric": "seen_allowed/ndcg@10",
}
