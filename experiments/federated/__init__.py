"""Federated fine-tuning: clients with different data train apart, and a server averages them after every round."""
