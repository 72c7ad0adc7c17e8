"""Other libraries' ends of the SDK. Nothing here is imported unless a program asks for it."""
