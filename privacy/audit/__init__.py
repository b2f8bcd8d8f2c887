"""What an attacker can do: measurements that a claim of privacy is held against."""
