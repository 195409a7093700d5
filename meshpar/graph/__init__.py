"""What later rooms read: the captured graph, the facts about its nodes, what they cost."""
