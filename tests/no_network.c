// Preloaded into a process and its children: nothing of it reaches a network, and each attempt becomes a line
// of the file that ODTRT_ATTEMPTS names. A socket that is only opened passes: TensorFlow imports urllib3, which
// opens one to see whether there is IPv6 here.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void record(const char* what, const char* name) {
  char line[300];
  const char* path = getenv("ODTRT_ATTEMPTS");
  const int length = snprintf(line, sizeof line, "%s %s\n", what, name ? name : "");
  const int file = path ? open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644) : -1;
  if (file < 0 || write(file, line, strlen(line)) != (ssize_t)strlen(line) || length < 0) abort();
  close(file);
}

static int reaches_out(const struct sockaddr* address) {
  return address && address->sa_family != AF_UNIX && address->sa_family != AF_NETLINK && address->sa_family != AF_UNSPEC;
}

static int refuse(const char* what) {
  record(what, "");
  errno = ENETUNREACH;
  return -1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

int connect(int fd, const struct sockaddr* address, socklen_t length) {
  return reaches_out(address) ? refuse("connect") : REAL(connect)(fd, address, length);
}

ssize_t sendto(int fd, const void* data, size_t size, int flags, const struct sockaddr* address, socklen_t length) {
  return reaches_out(address) ? refuse("sendto") : REAL(sendto)(fd, data, size, flags, address, length);
}

ssize_t sendmsg(int fd, const struct msghdr* message, int flags) {
  return reaches_out(message->msg_name) ? refuse("sendmsg") : REAL(sendmsg)(fd, message, flags);
}

int listen(int fd, int backlog) {
  int domain = AF_UNSPEC;
  socklen_t length = sizeof domain;
  getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &length);
  return domain == AF_INET || domain == AF_INET6 ? refuse("listen") : REAL(listen)(fd, backlog);
}

int getaddrinfo(const char* host, const char* service, const struct addrinfo* hints, struct addrinfo** found) {
  (void)service, (void)hints, (void)found;
  record("getaddrinfo", host);
  return EAI_FAIL;
}

struct hostent* gethostbyname(const char* host) {
  record("gethostbyname", host);
  h_errno = NO_RECOVERY;
  return NULL;
}
