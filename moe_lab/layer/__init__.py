"""The thing under study: router -> plan -> dispatch -> experts -> combine."""
