// Preloaded into a run: every request for an address outside this machine is recorded and refused.
// It works below Python, so libraries in C++ or Rust are covered too; statically linked ones (wandb's Go) are not.

#include <arpa/inet.h>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <netdb.h>
#include <sys/socket.h>
#include <unistd.h>

static void note(const char *what, const char *where) {
    const char *path = getenv("NETWORK_ATTEMPTS");
    if (FILE *file = path ? fopen(path, "a") : nullptr) {
        fprintf(file, "%s %s\n", what, where);
        fclose(file);
    }
}

static bool is_outside(const sockaddr *address, char *name, size_t size) {
    if (address == nullptr) return false;
    if (address->sa_family == AF_INET) {
        const in_addr &ip = reinterpret_cast<const sockaddr_in *>(address)->sin_addr;
        inet_ntop(AF_INET, &ip, name, size);
        return strncmp(name, "127.", 4) != 0 && strcmp(name, "0.0.0.0") != 0;
    }
    if (address->sa_family == AF_INET6) {
        const in6_addr &ip = reinterpret_cast<const sockaddr_in6 *>(address)->sin6_addr;
        inet_ntop(AF_INET6, &ip, name, size);
        return strcmp(name, "::1") != 0 && strcmp(name, "::") != 0 && strncmp(name, "::ffff:127.", 11) != 0;
    }
    return false;
}

template <typename Function> static Function next(const char *name) {
    return reinterpret_cast<Function>(dlsym(RTLD_NEXT, name));
}

extern "C" int connect(int socket, const sockaddr *address, socklen_t size) {
    char name[INET6_ADDRSTRLEN] = "";
    if (is_outside(address, name, sizeof name)) {
        note("connect", name);
        errno = ENETUNREACH;
        return -1;
    }
    return next<int (*)(int, const sockaddr *, socklen_t)>("connect")(socket, address, size);
}

extern "C" ssize_t sendto(int socket, const void *data, size_t bytes, int flags, const sockaddr *address,
                          socklen_t size) {
    char name[INET6_ADDRSTRLEN] = "";
    if (is_outside(address, name, sizeof name)) {
        note("sendto", name);
        errno = ENETUNREACH;
        return -1;
    }
    return next<ssize_t (*)(int, const void *, size_t, int, const sockaddr *, socklen_t)>("sendto")(
        socket, data, bytes, flags, address, size);
}

extern "C" int getaddrinfo(const char *node, const char *service, const addrinfo *hints, addrinfo **found) {
    char own[256] = "";
    gethostname(own, sizeof own - 1);
    unsigned char numeric[sizeof(in6_addr)];
    const bool is_here = node == nullptr || !strcmp(node, "localhost") || !strcmp(node, own) || node[0] == 0 ||
                         inet_pton(AF_INET, node, numeric) || inet_pton(AF_INET6, node, numeric);
    if (!is_here) {
        note("look up", node);
        return EAI_NONAME;
    }
    return next<int (*)(const char *, const char *, const addrinfo *, addrinfo **)>("getaddrinfo")(node, service,
                                                                                                 hints, found);
}
