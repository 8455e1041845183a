"""What people see in a terminal: progress, plans, boards, members, methods. Nothing else uses rich."""
