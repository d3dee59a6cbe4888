/* Preloaded into a program, it makes the folder $NO_LINKS a file system without hard and symbolic links, as Azure Files
   and other SMB shares are: the calls that make links there fail. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int refused(const char *path) {
    const char *folder = getenv("NO_LINKS");
    char here[PATH_MAX];
    if (folder == NULL) return 0;
    if (path[0] != '/') path = getcwd(here, sizeof here) ? here : "";
    return strncmp(path, folder, strlen(folder)) == 0;
}

#define REFUSING(name, parameters, arguments)                                                      \
    int name parameters {                                                                          \
        int(*original) parameters = dlsym(RTLD_NEXT, #name);                                       \
        if (refused(made)) {                                                                       \
            errno = EOPNOTSUPP;                                                                    \
            return -1;                                                                             \
        }                                                                                          \
        return original arguments;                                                                 \
    }

REFUSING(link, (const char *old, const char *made), (old, made))
REFUSING(linkat, (int from, const char *old, int to, const char *made, int flags), (from, old, to, made, flags))
REFUSING(symlink, (const char *old, const char *made), (old, made))
REFUSING(symlinkat, (const char *old, int to, const char *made), (old, to, made))
