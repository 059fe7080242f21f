def busiest(expert_ids, num_experts):
    """Return the expert with the most tokens, and its share of them."""
    counts = [0] * num_experts
    for chosen in expert_ids:
        for expert in chosen:
            counts[expert] += 1
    total = sum(counts)
    if total == 0:
        raise ValueError("no tokens were routed")
    top = max(range(num_experts), key=counts.__getitem__)
    return top, counts[top] / total


if __name__ == "__main__":
    print(busiest([(0, 3), (3, 1), (2, 3)], num_experts=4))
